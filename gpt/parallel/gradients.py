"""Gradient synchronisation and parameter broadcast around an optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor

from gpt.config.parameters import parameter
from gpt.parallel.tensor_shards import tp_axis
from gpt.parallel.topology import Topology

BUCKET_ELEMENTS = 1 << 25  # per collective: 128 MiB in float32


def sum_gradients(topology: Topology, parameters: dict[str, Tensor]) -> None:
    """Sum the gradients over the model replicas, in place, once per step.

    ZeRO-2 and ZeRO-3 have done so over the sharding group already. Under sequence parallel the gradients of replicated
    parameters outside the embedding cover this rank's positions only and are summed over the tensor-parallel ranks too.
    """
    present = {name: p for name, p in parameters.items() if p.grad is not None}
    if topology.parallel.sequence_parallel:
        partial = [p.grad for name, p in present.items() if tp_axis(p) is None and parameter(name).part != "embedding"]
        _sum([topology.mp_group], partial)
    if topology.gradient_groups:
        _sum(topology.gradient_groups, [p.grad for p in present.values()])


def _sum(groups: list[Any], tensors: list[Tensor]) -> None:
    with paddle.no_grad():
        for bucket in _buckets(tensors):
            flat = _flat(bucket)
            for group in groups:
                dist.all_reduce(flat, group=group)
            _unflat(flat, bucket)


def is_unique_parameter(topology: Topology, name: str, p: Tensor) -> bool:
    """Return whether sums and checkpoints take this rank's shard of a parameter, among the ranks of its replica.

    Of replicated parameters they take the first mp rank's, of the shared embedding the first stage's.
    """
    return not topology.is_shared_embedding_copy(name) and (topology.mp_rank == 0 or tp_axis(p) is not None)


def broadcast_updated_parameters(topology: Topology, parameters: dict[str, Tensor], owner: dict[str, int]) -> None:
    """Broadcast each parameter from its owner, which has updated it, over the sharding group."""
    group = topology.sharding_group
    with paddle.no_grad():
        for rank, source in enumerate(group.ranks):
            for bucket in _buckets([p for name, p in parameters.items() if owner[name] == rank]):
                flat = _flat(bucket)
                dist.broadcast(flat, src=source, group=group)
                if source != topology.rank:
                    _unflat(flat, bucket)


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield runs of tensors of one type, each of at most ``BUCKET_ELEMENTS`` or a single tensor."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.size > BUCKET_ELEMENTS):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += int(tensor.size)
    if bucket:
        yield bucket


def _flat(tensors: list[Tensor]) -> Tensor:
    return paddle.concat([tensor.flatten() for tensor in tensors])


def _unflat(flat: Tensor, tensors: list[Tensor]) -> None:
    """Copy the pieces of ``flat`` back into the tensors that it was made of."""
    for tensor, piece in zip(tensors, paddle.split(flat, [int(t.size) for t in tensors]), strict=True):
        tensor.copy_(piece.reshape(tensor.shape), False)
