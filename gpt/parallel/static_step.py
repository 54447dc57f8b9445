"""The training step as a static program: ``parallel.static=true``.

Paddle's ``to_static`` traces the loss once, adds backward pass, clip and update, cuts the program for this rank and
inserts the communication. From then on parameters and optimizer state live in the program; ``sync_to_model`` copies
the parameters back for evaluation and checkpoints.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor, nn
from paddle.distributed.auto_parallel.static.engine import DistributedInputSpec

from gpt.parallel.semi_auto import MeshPlacement, to_local

NORM = "gradient_norm"
RATE = "learning_rate_0"  # as the first optimizer of a process calls it
Tensors = dict[str, Tensor]


class _Loss(nn.Layer):  # type: ignore[misc]
    """The layer that is lowered."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor, weight_BT: Tensor) -> Tensor:
        return self.model.loss(tokens_BT, labels_BT, weight_BT, 1.0)


class _Clip(nn.ClipGradByGlobalNorm):  # type: ignore[misc]
    """Clips as ``gpt.train.grad_norm.clip`` does, keeps the norm, and skips the update if it is not finite."""

    def __init__(self, limit: float, optimizer: Any) -> None:
        super().__init__(limit or 1.0)
        self.limit, self.optimizer = limit, optimizer

    def _pir_clip(self, params_grads: Any) -> Any:
        places = [p.dist_attr() for p, _ in params_grads]
        grads = [  # a norm of sums, not a sum of norms
            dist.reshard(grad, place.process_mesh, place.placements)
            for (_, grad), place in zip(params_grads, places, strict=True)
        ]
        squares = [paddle._C_ops.squared_l2_norm(grad).reshape([1]) for grad in grads]
        norm = paddle.add_n(squares).sqrt()
        zero = nn.initializer.Constant(0.0)
        kept = paddle.pir.core.create_persistable_value(
            "float32", [1], NORM, initializer=zero, dist_attr=norm.dist_attr()
        )
        paddle._C_ops.assign_out_(norm, kept)
        self.optimizer._set_auxiliary_var("found_inf", paddle.logical_not(paddle.isfinite(norm)))
        if self.limit:
            factor = self.limit / paddle.maximum(norm, paddle.full([1], self.limit))
            grads = [grad * factor for grad in grads]
        return [(p, grad) for (p, _), grad in zip(params_grads, grads, strict=True)]


class StaticStep:
    """The training step of a model as a program.

    Args:
        model: whose parameters are distributed tensors.
        placement: of this rank.
        optimizer: of ``MeshPlacement.shard_optimizer``.
        clip_norm: 0: no clip.
        micros: micro batches per step.
    """

    def __init__(self, model: Any, placement: MeshPlacement, optimizer: Any, clip_norm: float, micros: int) -> None:
        self.placement, self.micros = placement, micros
        self._loss, self._optimizer, self._clip_norm = _Loss(model), optimizer, clip_norm
        self._slots: Tensors = {}
        self._places: dict[str, list[Any]] = {}
        self._program: Any = None

    def step(self, arrays: tuple[Tensor, ...], lr: float) -> tuple[float, float]:
        """Run forward and backward passes and update; return this replica's loss and the global gradient norm.

        Args:
            arrays: tokens, labels, and the weight of every token's loss, of this replica's rows.
            lr: learning rate.
        """
        if self._program is None:
            self._lower(self.placement.shard_inputs(tuple(array[: array.shape[0] // self.micros] for array in arrays)))
        _variable(RATE).set(np.float32(lr), paddle.framework._current_expected_place())
        loss = self._program(*self.placement.shard_inputs(arrays))
        return float(np.sum(loss)), float(np.array(_variable(NORM))[0])

    def _lower(self, micro: tuple[Tensor, ...]) -> None:
        """Make the program for micro batches of this shape."""
        inner = self._optimizer._inner_opt
        inner._grad_clip = _Clip(self._clip_norm, inner)
        strategy = dist.Strategy()
        if self.micros > 1:
            strategy.gradient_merge.enable = True
            strategy.gradient_merge.k_steps = self.micros
            strategy.gradient_merge.avg = False  # every micro batch is divided by the count of all
        specs = [DistributedInputSpec.from_dtensor(tensor, f"input{i}") for i, tensor in enumerate(micro)]
        self._places = {p.name: p.placements for p in self._loss.parameters()}
        with _quietly():
            program = dist.to_static(
                self._loss, None, lambda loss: loss, self._optimizer, strategy, input_spec=[specs, []]
            )
            program.train()
        self._program = program
        state = self.optimizer_state()
        for key, shard in self._slots.items():
            self.placement.load_local(state[key], shard)
            _variable(key).set(to_local(state[key]).numpy(), paddle.framework._current_expected_place())
        self._slots = {}

    def sync_to_model(self) -> None:
        """Set the model's parameters to those of the program."""
        if self._program is None:
            return
        for p, value in zip(*self._program._engine.concrete_program.parameters[:2], strict=True):
            part = paddle.to_tensor(np.array(_variable(value.name)))
            whole = self.placement.from_local(part, self._places[p.name])
            p.get_tensor()._share_data_with(whole.get_tensor())

    def optimizer_state(self) -> Tensors:
        """Return the optimizer state by Paddle's names; only after the first step."""
        return {k: v for k, v in self._program.state_dict("opt").items() if k not in (NORM, RATE)}

    def restore(self, slots: Tensors) -> None:
        """Set the optimizer state, by Paddle's names, of this rank's tensor-parallel shards; before the first step."""
        assert self._program is None
        self._slots = slots


def _variable(name: str) -> Any:
    """Return a variable of the program."""
    return paddle.static.global_scope().find_var(name).get_tensor()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Hide the progress lines of lowering."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.filterwarnings("ignore", message="Tensor do not have 'place' interface")
        yield
    logging.disable(before)
