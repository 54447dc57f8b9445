"""Sharded gradients and parameters over the sharding group: ZeRO stages 2 and 3 (Rajbhandari et al., 2020).

At every stage a parameter belongs to one rank of the group, its owner, which alone has its optimizer state.

- Stage 2: as soon as a micro batch's gradient of a parameter is there it is added up on the owner; the others drop it.
- Stage 3: the others drop the parameter too. A block's parameters come from their owners before its forward and before
  its backward pass and go again afterwards; what is not in a block stays from the first use in a step to the last.

Fleet's own classes for these stages keep their slices in storages that cannot be made on a CPU, bring a clip of their
own and count a tied table twice; these hooks are the same code everywhere, over Paddle's collectives.
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

from gpt.parallel.topology import Topology


class ZeroShards:
    """What this rank drops and when; nothing at stage 1.

    Args:
        topology: of this rank.
        owner: place in the sharding group of each parameter's owner, by logical name.
    """

    def __init__(self, topology: Topology, owner: dict[str, int]) -> None:
        degree, stage = topology.zero_degree, topology.parallel.sharding_stage
        self.topology = topology
        self.owner = owner
        self.gradients_too = degree > 1 and stage >= 2
        self.parameters_too = degree > 1 and stage >= 3
        self._sums: dict[str, Tensor] = {}  # of this step's gradients, of owned parameters
        self._outside: dict[str, Tensor] = {}  # parameters that are not in a block

    def settle(self, parameters: dict[str, Tensor], part: nn.Layer, *, block: bool) -> None:
        """Take charge of a part of the model that has just been made and has its first values.

        Args:
            parameters: of the part, by logical name.
            part: of the model.
            block: whether it is used once, in one piece.
        """
        if self.gradients_too:
            for name, p in parameters.items():
                p._register_backward_hook(partial(self._add_up, name, p))
        if self.parameters_too:
            self._release(parameters)
            if block:
                come, go = partial(self._gather, parameters), partial(self._release, parameters)
                part.register_forward_pre_hook(lambda _, inputs: (_Then.apply(inputs[0], come, go),))
                part.register_forward_post_hook(lambda _, inputs, output: _Then.apply(output, go, come))
            else:
                self._outside |= parameters

    def is_mine(self, name: str) -> bool:
        """Whether this rank is the owner."""
        return self.owner[name] == self.topology.sharding_rank

    @contextlib.contextmanager
    def outside_blocks(self) -> Iterator[None]:
        """While the model is used: parameters that are not in a block are there."""
        self._gather(self._outside)
        yield
        self._release(self._outside)

    def finish(self, parameters: dict[str, Tensor]) -> None:
        """After the last backward pass of a step: owned parameters have their gradients, the others none."""
        for name, total in self._sums.items():
            parameters[name].grad = total
        self._sums = {}

    def _add_up(self, name: str, p: Tensor, *_: Any) -> None:
        """The hook of a gradient: give it to the owner."""
        group = self.topology.sharding_group
        with paddle.no_grad():
            gradient = p.grad.clone() if self.is_mine(name) else p.grad
            dist.reduce(gradient, dst=group.ranks[self.owner[name]], group=group)
            p.clear_gradient(False)
            if not self.is_mine(name):
                return
            if name in self._sums:
                self._sums[name].add_(gradient)
            else:
                self._sums[name] = gradient

    def _gather(self, parameters: dict[str, Tensor]) -> None:
        group = self.topology.sharding_group
        with paddle.no_grad():
            for name, p in parameters.items():
                here = p.detach() if self.is_mine(name) else paddle.empty(p.shape, p.dtype)
                dist.broadcast(here, src=group.ranks[self.owner[name]], group=group)
                if not self.is_mine(name):
                    here._share_buffer_to(p)

    def _release(self, parameters: dict[str, Tensor]) -> None:
        for name, p in parameters.items():
            if not self.is_mine(name):
                p._clear_data()


class _Then(PyLayer):  # type: ignore[misc]
    """Does something at a place of the forward pass, and something else at this place of the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, now: Callable[[], None], later: Callable[[], None]) -> Tensor:
        ctx.later = later
        now()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        ctx.later()
        return grad.clone()
