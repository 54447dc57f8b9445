"""Map each rank's tensor shards to the global tensors, so that checkpoints can be resharded.

A checkpoint has the names and shapes of one process. The rows that tensor-parallel ranks add to the word table as
padding are not saved, and zeros when loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from gpt.parallel.tensor_shards import local_shape, tp_axis
from gpt.parallel.topology import Topology
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
        """Return first and last + 1 index along every axis of a global array of ``shape``."""
        return [(self.start, self.stop) if axis == self.axis else (0, size) for axis, size in enumerate(shape)]


@dataclass(frozen=True)
class TensorShard:
    """This rank's shard of an array for a checkpoint: a float32 copy on the host."""

    shape: list[int]  # global
    where: ShardRange
    array: Array


TensorShards = dict[str, TensorShard]
Arrays = dict[str, Array]


class ShardReader(Protocol):
    """Arrays that can be read by slice."""

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Global shapes by name."""

    def read(self, name: str, where: ShardRange) -> Array:
        """Read a slice of an array."""


def parameter_of(key: str, parameters: dict[str, list[int]]) -> str:
    """Return the name of the parameter that an array is the value or a slot of."""
    return key if key in parameters else key.rsplit(".", 1)[0]


def require_same(stored: dict[str, list[int]], own: dict[str, list[int]]) -> None:
    """Raise if a checkpoint's parameters differ from the model's.

    Raises:
        ValueError: names or shapes differ.
    """
    if set(stored) != set(own):
        raise ValueError(f"the checkpoint is of another model: {sorted(set(stored) ^ set(own))[:5]}")
    for name, shape in own.items():
        if stored[name] != shape:
            raise ValueError(f"{name} has shape {stored[name]} there and {shape} here")


def shard_range(topology: Topology, p: Tensor, shape: list[int]) -> ShardRange:
    """Return the range of this rank's shard ``p`` in the global ``shape``, without padding rows.

    Example: of 384 rows three ranks with 256 each have 0 to 256, 256 to 384, and 384 to 384.
    """
    axis = tp_axis(p)
    if axis is None:
        return ShardRange(0, 0, shape[0])
    size = local_shape(topology, p)[axis]
    first = topology.mp_rank * size
    return ShardRange(axis, min(first, shape[axis]), min(first + size, shape[axis]))


def local_shards(
    topology: Topology, values: dict[str, Tensor], parameters: dict[str, Tensor], whole: dict[str, list[int]]
) -> TensorShards:
    """Copy this rank's shards of parameters or slots to the host.

    Args:
        topology: of this rank.
        values: by ``<parameter>`` or ``<parameter>.<slot>``.
        parameters: of the values, by logical name.
        whole: global shapes of all parameters.
    """
    shards: TensorShards = {}
    for key, value in values.items():
        name = parameter_of(key, whole)
        p = parameters[name]
        if list(value.shape) == local_shape(topology, p):
            where = shard_range(topology, p, whole[name])
            if where.start < where.stop:
                array = value.astype("float32").numpy()
                cut = [slice(None)] * where.axis + [slice(where.stop - where.start)]
                shards[key] = TensorShard(whole[name], where, np.ascontiguousarray(array[tuple(cut)]))
        elif topology.mp_rank == 0:  # a power of beta, the same on all ranks
            everything = ShardRange(0, 0, value.shape[0])
            shards[key] = TensorShard(list(value.shape), everything, value.astype("float32").numpy())
    return shards


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
    """Read this rank's shard of a parameter, or of a slot of its shape, with zeros in padding rows."""
    where = shard_range(topology, p, source.shapes[name])
    array = source.read(name, where)
    missing = local_shape(topology, p)[where.axis] - array.shape[where.axis]
    if not missing:
        return array
    return np.pad(array, [(0, missing if axis == where.axis else 0) for axis in range(array.ndim)])


def read_local_optimizer_state(
    topology: Topology, owned: dict[str, Tensor], source: ShardReader, whole: dict[str, list[int]]
) -> Arrays:
    """Read this rank's shards of the slots of the parameters that it updates."""
    state = {}
    for key, shape in source.shapes.items():
        name = parameter_of(key, whole)
        if name in owned and shape == whole[name]:
            state[key] = read_local_shard(topology, owned[name], source, key)
        elif name in owned:
            state[key] = source.read(key, ShardRange(0, 0, shape[0]))
    return state
