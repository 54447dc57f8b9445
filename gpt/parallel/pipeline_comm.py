"""Decoding over several ranks: hidden states go from stage to stage, logits come back to all. No gradients.

B batch, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor

from gpt.parallel.topology import Topology


def pipeline_forward(topology: Topology, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """What the last stage makes of ``x``, each stage doing its ``run`` on what the one before it made.

    Args:
        topology: of this rank.
        x: on the first stage; elsewhere room of that shape and element type.
        run: of this stage.

    Returns:
        On the last stage the result, elsewhere of no meaning.
    """
    last = topology.parallel.pp_degree - 1
    for stage in range(topology.parallel.pp_degree):
        if stage == topology.stage:
            x = run(x)
        if stage < last:
            _from_stage(topology, x, stage)
    return x


def broadcast_from_last_stage(topology: Topology, shape: list[int], dtype: str, make: Callable[[], Tensor]) -> Tensor:
    """What the last stage makes, on all stages."""
    last = topology.parallel.pp_degree - 1
    made = make() if topology.stage == last else paddle.empty(shape, dtype)
    if last:
        _from_stage(topology, made, last)
    return made


def broadcast_object(topology: Topology, thing: Any) -> Any:
    """What the first rank says, on all ranks; other ranks' ``thing`` is not looked at."""
    if topology.hcg is None:
        return thing
    said = [thing]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def _from_stage(topology: Topology, x: Tensor, stage: int) -> None:
    group = topology.hcg.get_pipe_parallel_group()
    dist.broadcast(x, group.ranks[stage], group)
