"""What ranks give one another around a step: gradients and updated parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor

from gpt.parallel.topology import Topology, tp_axis

BUCKET_ELEMENTS = 1 << 25  # that travel at once: 128 MiB in float32


def sum_gradients(topology: Topology, parameters: dict[str, Tensor]) -> None:
    """Add up the gradients over the model replicas, in place, once per step.

    Sharding stages 2 and 3 have done so over the sharding group already. Under sequence parallel, what every mp rank
    has of a block is added up over them too.
    """
    groups = topology.gradient_groups
    seen_in_part = [
        p.grad for name, p in parameters.items() if p.grad is not None and topology.has_partial_gradient(name, p)
    ]
    if seen_in_part:
        _sum([topology.mp_group], seen_in_part)
    if groups:
        _sum(groups, [p.grad for p in parameters.values() if p.grad is not None])


def _sum(groups: list[Any], tensors: list[Tensor]) -> None:
    with paddle.no_grad():
        for bucket in _buckets(tensors):
            flat = _flat(bucket)
            for group in groups:
                dist.all_reduce(flat, group=group)
            _unflat(flat, bucket)


def is_unique_parameter(topology: Topology, name: str, p: Tensor) -> bool:
    """Whether this rank answers for what it has of a parameter, among the ranks of its replica.

    What every mp rank has is the first one's; the word table that the last stage has for its head is the first stage's.
    """
    return not topology.is_shared_embedding_copy(name) and (topology.mp_rank == 0 or tp_axis(p) is not None)


def broadcast_updated_parameters(topology: Topology, parameters: dict[str, Tensor], owner: dict[str, int]) -> None:
    """Give each parameter from the rank that has updated it to the others of the sharding group."""
    group = topology.sharding_group
    with paddle.no_grad():
        for rank, source in enumerate(group.ranks):
            for bucket in _buckets([p for name, p in parameters.items() if owner[name] == rank]):
                flat = _flat(bucket)
                dist.broadcast(flat, src=source, group=group)
                if source != topology.rank:
                    _unflat(flat, bucket)


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one type, each run of at most ``BUCKET_ELEMENTS`` or a single tensor."""
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
    """Copy the pieces of ``flat`` back into the tensors it was made of."""
    for tensor, piece in zip(tensors, paddle.split(flat, [int(t.size) for t in tensors]), strict=True):
        tensor.copy_(piece.reshape(tensor.shape), False)
