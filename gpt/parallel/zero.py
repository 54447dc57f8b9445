"""Sharded gradients and parameters over the sharding group: ZeRO stages 2 and 3 (Rajbhandari et al., 2020).

At every stage a parameter belongs to one rank of the group, its owner, which alone has its optimizer state.

- Stage 2: each micro batch's gradient of a parameter is reduced to the owner at once; the other ranks free it.
- Stage 3: the other ranks free the parameter too. A block's parameters are gathered before its forward and before its
  backward pass and released afterwards; those outside the blocks stay from the first use in a step to the last.

Fleet's own classes for these stages keep their shards in storages that do not exist on a CPU, clip by themselves and
count a tied table twice; these hooks are the same code everywhere, over Paddle's collectives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from gpt.parallel import gradients
from gpt.parallel.topology import Topology


class ZeroShards:
    """Frees tensors that other ranks own; none at stage 1, where only the optimizer state is sharded.

    Args:
        topology: of this rank.
        owner: place in the sharding group of each parameter's owner, by logical name.
    """

    def __init__(self, topology: Topology, owner: dict[str, int]) -> None:
        self.topology = topology
        self.owner = owner
        self.stage = topology.parallel.sharding_stage if topology.zero_degree > 1 else 0
        self._sums: dict[str, Tensor] = {}  # of this step's gradients, of owned parameters
        self._outside: dict[str, Tensor] = {}  # parameters that are not in a block

    def register(self, parameters: dict[str, Tensor], part: nn.Layer, *, block: bool) -> None:
        """Register the hooks of a part of the model that has been built and has its initial values.

        Args:
            parameters: of the part, by logical name.
            part: of the model.
            block: whether it is one of the blocks, gathered for its own passes only.
        """
        if self.stage >= 2:
            for name, p in parameters.items():
                p._register_backward_hook(partial(self._reduce_to_owner, name, p))
        if self.stage >= 3:
            self._release(parameters)
            if block:
                gather, release = partial(self._gather, parameters), partial(self._release, parameters)
                part.register_forward_pre_hook(lambda _, inputs: (_CallInPasses.apply(inputs[0], gather, release),))
                part.register_forward_post_hook(lambda _, inputs, output: _CallInPasses.apply(output, release, gather))
            else:
                self._outside |= parameters

    def is_owned(self, name: str) -> bool:
        """Return whether this rank owns a parameter."""
        return self.owner[name] == self.topology.sharding_rank

    def resident(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters that this rank holds between steps."""
        return {name: p for name, p in parameters.items() if self.stage < 3 or self.is_owned(name)}

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold the parameters outside the blocks while the model is used."""
        self._gather(self._outside)
        yield
        self._release(self._outside)

    def collect_gradients(self, parameters: dict[str, Tensor]) -> None:
        """Set the summed gradients of owned parameters, after the last backward pass of a step; others have none."""
        for name, total in self._sums.items():
            parameters[name].grad = total
        self._sums = {}

    def broadcast_updated(self, parameters: dict[str, Tensor]) -> None:
        """Broadcast the parameters from the ranks that have updated them; at stage 3 only owners have them."""
        if 0 < self.stage < 3:
            gradients.broadcast_updated_parameters(self.topology, parameters, self.owner)

    def _reduce_to_owner(self, name: str, p: Tensor, *_: Any) -> None:
        """Reduce a gradient to the parameter's owner: a backward hook."""
        group = self.topology.sharding_group
        with paddle.no_grad():
            gradient = p.grad.clone() if self.is_owned(name) else p.grad
            dist.reduce(gradient, dst=group.ranks[self.owner[name]], group=group)
            p.clear_gradient(False)
            if not self.is_owned(name):
                return
            if name in self._sums:
                self._sums[name].add_(gradient)
            else:
                self._sums[name] = gradient

    def _gather(self, parameters: dict[str, Tensor]) -> None:
        group = self.topology.sharding_group
        with paddle.no_grad():
            for name, p in parameters.items():
                value = p.detach() if self.is_owned(name) else paddle.empty(p.shape, p.dtype)
                dist.broadcast(value, src=group.ranks[self.owner[name]], group=group)
                if not self.is_owned(name):
                    value._share_buffer_to(p)

    def _release(self, parameters: dict[str, Tensor]) -> None:
        for name, p in parameters.items():
            if not self.is_owned(name):
                p._clear_data()


class _CallInPasses(PyLayer):  # type: ignore[misc]
    """The identity; calls one function in the forward pass and another in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, in_forward: Callable[[], None], in_backward: Callable[[], None]) -> Tensor:
        ctx.in_backward = in_backward
        in_forward()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        ctx.in_backward()
        return grad.clone()
