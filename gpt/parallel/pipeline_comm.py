"""Pipeline communication of decoding, without gradients: stages forward hidden states, the last broadcasts logits.

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
    """Pass ``x`` through ``run`` of every stage; return the result on the last stage, elsewhere an undefined tensor.

    Args:
        topology: of this rank.
        x: on the first stage; elsewhere a buffer of that shape and element type.
        run: of this stage.
    """
    last = topology.parallel.pp_degree - 1
    for stage in range(topology.parallel.pp_degree):
        if stage == topology.stage:
            x = run(x)
        if stage < last:
            _broadcast_from_stage(topology, x, stage)
    return x


def broadcast_from_last_stage(topology: Topology, shape: list[int], dtype: str, make: Callable[[], Tensor]) -> Tensor:
    """Return on all stages what ``make`` returns on the last one."""
    last = topology.parallel.pp_degree - 1
    tensor = make() if topology.stage == last else paddle.empty(shape, dtype)
    if last:
        _broadcast_from_stage(topology, tensor, last)
    return tensor


def broadcast_object(topology: Topology, value: Any) -> Any:
    """Return rank 0's ``value`` on all ranks."""
    if topology.hcg is None:
        return value
    objects = [value]
    dist.broadcast_object_list(objects, src=0)
    return objects[0]


def _broadcast_from_stage(topology: Topology, x: Tensor, stage: int) -> None:
    group = topology.hcg.get_pipe_parallel_group()
    dist.broadcast(x, group.ranks[stage], group)
