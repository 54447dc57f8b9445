"""The global gradient norm, and clipping by it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from paddle import Tensor

from gpt.parallel.gradients import is_unique_parameter
from gpt.parallel.topology import Topology

if TYPE_CHECKING:
    import paddle


def loss_and_norm(topology: Topology, loss: float, parameters: dict[str, Tensor]) -> tuple[float, float]:
    """The loss of the whole batch and the norm of its gradient, the same on every rank.

    Args:
        topology: of this rank.
        loss: this rank's part.
        parameters: that this rank updates, by logical name, their gradients already added up over the replicas.
    """
    if topology.hcg is None:
        return loss, global_norm(list(parameters.values()))
    if topology.placed:
        counted = [
            p
            for name, p in parameters.items()
            if topology.placed.answers_for(p.grad) and not topology.is_shared_embedding_copy(name)
        ]
    else:
        counted = [
            p for name, p in parameters.items() if topology.writes_checkpoint and is_unique_parameter(topology, name, p)
        ]
    squares = global_norm(counted) ** 2 if counted else 0.0
    loss, squares = topology.all_reduce_sum(loss, squares)
    return loss, math.sqrt(squares)


def global_norm(parameters: list[paddle.Tensor]) -> float:
    """Root of the sum of squares of all gradients, in float32; one number for the host."""
    from gpt.model import layers
    from gpt.parallel.semi_auto import to_local

    gradients = [to_local(p.grad) for p in parameters if p.grad is not None]
    return math.sqrt(layers.sum_of_squares(gradients))


def clip(parameters: list[paddle.Tensor], norm: float, limit: float, loss_scale: float = 1.0) -> None:
    """Divide all gradients by the loss scale, and scale them by limit / norm if that is less than one, in place."""
    import paddle

    from gpt.parallel.semi_auto import to_local

    factor = (limit / norm if 0 < limit < norm else 1.0) / loss_scale
    if factor != 1.0:
        with paddle.no_grad():
            for p in parameters:
                if p.grad is not None:
                    to_local(p.grad).scale_(factor)
