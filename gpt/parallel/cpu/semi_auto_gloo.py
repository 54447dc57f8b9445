"""CPU adapter of the semi-auto engine of Paddle 3.3; imported only by its ranks on CPUs.

- Communicators: the engine makes one per axis of a mesh when it first needs it, all over one store, where Gloo's
  addresses of different groups are mixed up; here each is made beforehand over its own store. The static engine
  makes none at all on a CPU.
- Reduce-scatter, which has no kernel: an all-reduce, of which each rank keeps its part.
"""

from __future__ import annotations

from typing import Any

import paddle
import paddle.distributed as dist
from paddle.base import core
from paddle.distributed import collective
from paddle.distributed.auto_parallel import api
from paddle.distributed.auto_parallel.static import process_group

from gpt.parallel.cpu import sockets
from gpt.parallel.cpu.gloo import _store, _stores

_reshard = api.reshard


def prepare(mesh: Any, rank: int) -> None:
    """Make the communicators of ``mesh`` and replace missing operations, before the first distributed tensor."""
    api.reshard = _reshard_without_scatter
    process_group.ProcessGroup.instantiate = _instantiate
    paddle.set_flags({"FLAGS_new_executor_sequential_run": True})  # ranks must meet in the same order everywhere
    paddle._legacy_C_ops.barrier = lambda *_: None  # has no kernel; only keeps ranks together while groups are made
    for axis in mesh.dim_names:
        ranks = mesh.get_mesh_with_dim(axis).mesh.reshape(mesh.get_dim_size(axis), -1).T
        for group in ranks.tolist():
            if rank in group and len(group) > 1:
                _communicator("/".join(map(str, ["ReshardGroup", *group])), "dynamic", group, rank)


def _communicator(name: str, kind: str, ranks: list[int], rank: int) -> None:
    """Make a Gloo communicator for the engine under ``name``, which may differ by rank, when all ranks have arrived."""
    key = f"gpt/auto/{kind}/{'/'.join(map(str, ranks))}"
    barrier = sockets.SocketBarrier(collective._default_store, f"{key}/gate", ranks.index(rank), len(ranks))
    store = _store(collective._default_store, key, ranks.index(rank))
    barrier.enter()
    barrier.close()
    _stores.append(store)
    core.CommContextManager.create_gloo_comm_context(store, name, ranks.index(rank), len(ranks))


def _instantiate(group: Any) -> None:
    """Replaces ``ProcessGroup.instantiate`` of the static engine: make all waiting groups, in one order on all ranks.

    Group 0, of all ranks, exists already.
    """
    rank = dist.get_rank()
    for each in sorted(process_group.get_all_process_groups(), key=lambda each: list(each.ranks)):
        if not each._is_instantiate and each.id and each.nranks > 1 and rank in each.ranks:
            _communicator(str(each.id), "static", list(each.ranks), rank)
        each._is_instantiate = True


def _reshard_without_scatter(tensor: Any, mesh: Any, placements: list[Any]) -> Any:
    """``dist.reshard`` from partial sums to shards by way of full sums."""
    between = list(placements)
    for axis, (now, then) in enumerate(zip(tensor.placements, placements, strict=True)):
        if now.is_partial() and then.is_shard():
            between[axis] = dist.Replicate()
    if between != list(placements):
        tensor = _reshard(tensor, mesh, between)
    return _reshard(tensor, mesh, placements)
