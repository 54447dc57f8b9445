"""The global gradient norm, and clipping by it."""

from __future__ import annotations

import math

import paddle
from paddle import Tensor

from gpt.model import layers
from gpt.parallel.semi_auto import to_local
from gpt.parallel.topology import Topology


def loss_and_norm(topology: Topology, loss: float, unique: list[Tensor]) -> tuple[float, float]:
    """Return the loss of the global batch and the norm of its gradient, the same on every rank.

    Args:
        topology: of this rank.
        loss: sum over this replica's micro batches, on the rank that reports it.
        unique: parameters with summed gradients, each counted on one rank only.
    """
    squares = global_norm(unique) ** 2 if unique else 0.0
    loss, squares = topology.all_reduce_sum(topology.mask_to_loss_rank(loss), squares)
    return loss, math.sqrt(squares)


def global_norm(parameters: list[Tensor]) -> float:
    """Return the root of the sum of squares of all gradients, in float32, on the host."""
    return math.sqrt(layers.sum_of_squares([to_local(p.grad) for p in parameters if p.grad is not None]))


def clip(parameters: list[Tensor], norm: float, limit: float, loss_scale: float = 1.0) -> None:
    """Divide all gradients by the loss scale, and scale them by limit / norm if that is less than one, in place."""
    factor = (limit / norm if 0 < limit < norm else 1.0) / loss_scale
    if factor != 1.0:
        with paddle.no_grad():
            for p in parameters:
                if p.grad is not None:
                    to_local(p.grad).scale_(factor)
