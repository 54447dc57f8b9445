"""Where the slices of ranks are in whole arrays: what makes checkpoints free of topology.

A checkpoint names and shapes arrays as one process has them. The word table has as many rows there as on one rank: what
mp ranks pad beyond that takes no part in anything, so it is not saved, and zeros when loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from gpt.parallel.topology import Topology, tp_axis
from gpt.utils.arrays import Array

if TYPE_CHECKING:
    from paddle import Tensor


@dataclass(frozen=True)
class ShardRange:
    """Indices ``start`` to ``stop`` along ``axis``, and everything along the other axes."""

    axis: int
    start: int
    stop: int

    def box(self, shape: list[int]) -> list[tuple[int, int]]:
        """First and last + 1 index along every axis of a whole array of ``shape``."""
        return [(self.start, self.stop) if axis == self.axis else (0, size) for axis, size in enumerate(shape)]


@dataclass(frozen=True)
class TensorShard:
    """What a rank gives to a checkpoint of one array: float32 on the host, that nobody changes."""

    shape: list[int]  # of the whole
    where: ShardRange
    array: Array


TensorShards = dict[str, TensorShard]
Arrays = dict[str, Array]


class ShardReader(Protocol):
    """Arrays that can be read by slice."""

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Of the whole arrays, by name."""

    def read(self, name: str, where: ShardRange) -> Array:
        """A slice of one."""


def parameter_of(key: str, parameters: dict[str, list[int]]) -> str:
    """The parameter that an array is the value or a slot of."""
    return key if key in parameters else key.rsplit(".", 1)[0]


def require_same(there: dict[str, list[int]], here: dict[str, list[int]]) -> None:
    """Of a checkpoint and of a model.

    Raises:
        ValueError: they are not the same parameters, or not of the same shapes.
    """
    if set(there) != set(here):
        raise ValueError(f"the checkpoint is of another model: {sorted(set(there) ^ set(here))[:5]}")
    for name, shape in here.items():
        if there[name] != shape:
            raise ValueError(f"{name} has shape {there[name]} there and {shape} here")


def shard_range(topology: Topology, p: Tensor, shape: list[int]) -> ShardRange:
    """Where this rank's slice ``p`` of a parameter is in the whole of ``shape``; rows that only pad are not in it.

    Example: of 384 rows three ranks with 256 each have 0 to 256, 256 to 384, and 384 to 384.
    """
    axis = tp_axis(p)
    if axis is None:
        return ShardRange(0, 0, shape[0])
    size = topology.local_shape(p)[axis]
    first = topology.mp_rank * size
    return ShardRange(axis, min(first, shape[axis]), min(first + size, shape[axis]))


def local_shards(
    topology: Topology, values: dict[str, Tensor], parameters: dict[str, Tensor], whole: dict[str, list[int]]
) -> TensorShards:
    """Copies on the host of what this rank answers for.

    Args:
        topology: of this rank.
        values: of parameters or slots, by ``<parameter>`` or ``<parameter>.<slot>``.
        parameters: that this rank answers for, by logical name.
        whole: shapes of whole parameters.
    """
    found: TensorShards = {}
    for key, value in values.items():
        name = parameter_of(key, whole)
        p = parameters[name]
        if list(value.shape) == topology.local_shape(p):
            where = shard_range(topology, p, whole[name])
            if where.start < where.stop:
                array = value.astype("float32").numpy()
                cut = [slice(None)] * where.axis + [slice(where.stop - where.start)]
                found[key] = TensorShard(whole[name], where, np.ascontiguousarray(array[tuple(cut)]))
        elif topology.mp_rank == 0:  # a power of beta, the same on all ranks
            found[key] = TensorShard(
                list(value.shape), ShardRange(0, 0, value.shape[0]), value.astype("float32").numpy()
            )
    return found


def load_model(
    topology: Topology,
    parameters: dict[str, Tensor],
    source: ShardReader,
    shapes: dict[str, list[int]],
    assign: Callable[[str, Tensor, Array], None] | None = None,
) -> None:
    """Set parameters to this rank's shards of a checkpoint, or call ``assign`` with name, parameter and shard.

    Raises:
        ValueError: the checkpoint is of a model with other parameters or shapes.
    """
    import paddle

    require_same(source.shapes, shapes)
    for name, p in parameters.items():
        shard = read_local_shard(topology, p, source, name)
        if assign:
            assign(name, p, shard)
        else:
            p.set_value(paddle.to_tensor(shard).astype(p.dtype))


def read_local_shard(topology: Topology, p: Tensor, source: ShardReader, name: str) -> Array:
    """This rank's slice of a parameter, or of a slot of its shape, with zeros where it only pads."""
    where = shard_range(topology, p, source.shapes[name])
    array = source.read(name, where)
    missing = topology.local_shape(p)[where.axis] - array.shape[where.axis]
    if not missing:
        return array
    return np.pad(array, [(0, missing if axis == where.axis else 0) for axis in range(array.ndim)])


def read_local_optimizer_state(
    topology: Topology, owned: dict[str, Tensor], source: ShardReader, whole: dict[str, list[int]]
) -> Arrays:
    """This rank's slices of the slots of the parameters that it updates."""
    found = {}
    for key, shape in source.shapes.items():
        name = parameter_of(key, whole)
        if name in owned:
            like_it = shape == whole[name]
            found[key] = (
                read_local_shard(topology, owned[name], source, key)
                if like_it
                else source.read(key, ShardRange(0, 0, shape[0]))
            )
    return found
