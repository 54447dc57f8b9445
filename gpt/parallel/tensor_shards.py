"""Shapes of tensor-parallel parameters and of this rank's shards of them. Imports no Paddle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpt.config.parameters import MP
from gpt.parallel.topology import Topology
from gpt.utils.arrays import Array

if TYPE_CHECKING:
    from paddle import Tensor


def tp_axis(p: Tensor) -> int | None:
    """Return the axis along which a tensor is split over the tensor-parallel ranks; None: it is replicated."""
    if not p.is_dist():
        return int(p.split_axis) if getattr(p, "is_distributed", False) else None
    placement = dict(zip(p.process_mesh.dim_names, p.placements, strict=True)).get(MP)
    return int(placement.get_dim()) if placement is not None and placement.is_shard() else None


def local_shard(topology: Topology, array: Array, p: Tensor) -> Array:
    """Return this rank's shard of a parameter's global array."""
    axis = tp_axis(p)
    return array if axis is None else np.split(array, topology.parallel.mp_degree, axis)[topology.mp_rank]


def local_shape(topology: Topology, p: Tensor) -> list[int]:
    """Return the shape of this rank's tensor-parallel shard, before any sharding over replicas."""
    axis = tp_axis(p) if p.is_dist() else None
    return [size // (topology.parallel.mp_degree if i == axis else 1) for i, size in enumerate(p.shape)]


def global_shape(topology: Topology, p: Tensor) -> list[int]:
    """Return the shape of all tensor-parallel shards together."""
    axis = None if p.is_dist() else tp_axis(p)
    return [size * (topology.parallel.mp_degree if i == axis else 1) for i, size in enumerate(p.shape)]
