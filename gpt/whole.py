"""Whole arrays by logical name, from and to the slices of ranks: what makes checkpoints free of topology.

A checkpoint holds what one process would hold. The word table has as many rows there as on one rank: what mp ranks
pad beyond that takes no part in anything and is cut off and put on again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor

from gpt.config import Config, one_rank, padded_vocab
from gpt.data.tokens import Array
from gpt.topology import WORD, Topology, split_axis

Arrays = dict[str, Array]


def shapes(config: Config) -> dict[str, list[int]]:
    """Of all parameters of the model, as a checkpoint holds them."""
    m = config.model
    H, F = m.hidden, m.ffn
    norm, table = {"weight": [H], "bias": [H]}, [padded_vocab(one_rank(config)), H]
    block = {
        **{f"norm1.{k}": v for k, v in norm.items()},
        "attention.qkv.weight": [H, 3 * H],
        "attention.qkv.bias": [3 * H],
        "attention.out.weight": [H, H],
        "attention.out.bias": [H],
        **{f"norm2.{k}": v for k, v in norm.items()},
        "fc1.weight": [H, F],
        "fc1.bias": [F],
        "fc2.weight": [F, H],
        "fc2.bias": [H],
    }
    layers = {f"layers.{i}.{k}": v for i in range(m.layers) for k, v in block.items()}
    return {WORD: table, "position.weight": [m.positions, H], **layers, **{f"norm.{k}": v for k, v in norm.items()}}


def parameter_of(key: str, parameters: dict[str, Any]) -> str:
    """The parameter that an array is the value or a slot of."""
    return key if key in parameters else key.rsplit(".", 1)[0]


def gather(topology: Topology, config: Config, values: dict[str, Tensor], parameters: dict[str, Tensor]) -> Arrays:
    """Whole arrays on rank 0, nothing elsewhere; every rank must call it.

    Args:
        topology: of this rank.
        config: of the job.
        values: of parameters or slots, by ``<parameter>`` or ``<parameter>.<slot>``, that this rank answers for.
        parameters: by logical name.
    """
    local: Arrays = {}
    rows = padded_vocab(one_rank(config))
    for key, value in values.items():
        p = parameters[parameter_of(key, parameters)]
        whole = _joined(topology, value, split_axis(p) if list(value.shape) == list(p.shape) else None)
        local[key] = whole[:rows] if parameter_of(key, parameters) == WORD and whole.ndim == 2 else whole
    if topology.hcg is None:
        return local
    return _on_first_rank(topology, local if topology.mp_rank == 0 else {})


def _joined(topology: Topology, value: Tensor, axis: int | None) -> Array:
    """A copy on the host, of the whole if it is split along ``axis`` among the mp ranks."""
    if axis is None:
        return value.numpy()  # type: ignore[no-any-return]
    parts: list[Tensor] = []
    dist.all_gather(parts, value, group=topology.mp_group)
    return np.concatenate([part.numpy() for part in parts], axis)


def _on_first_rank(topology: Topology, local: Arrays) -> Arrays:
    listings: list[dict[str, Any]] = []
    dist.all_gather_object(listings, {key: list(array.shape) for key, array in local.items()})
    found: Arrays = {}
    for source, listing in enumerate(listings):
        for key, shape in listing.items():
            mine = source == topology.rank
            tensor = paddle.to_tensor(local[key]) if mine else paddle.empty(shape, "float32")
            dist.broadcast(tensor, src=source)
            if topology.rank == 0:
                found[key] = local[key] if mine else tensor.numpy()
    return found


def part(topology: Topology, name: str, whole: Array, p: Tensor) -> Array:
    """This rank's slice of a checkpoint's array that has the shape of parameter ``name``."""
    rows = topology.whole_shape(p)[0]
    if name == WORD and len(whole) < rows:
        whole = np.concatenate([whole, np.zeros((rows - len(whole), *whole.shape[1:]), whole.dtype)])
    return topology.part(whole, p)


def parts(topology: Topology, slots: Arrays, parameters: dict[str, Tensor]) -> Arrays:
    """This rank's slices of the slots of its parameters."""
    found = {}
    for key, slot in slots.items():
        name = key.rsplit(".", 1)[0]
        if name in parameters:
            like_it = slot.ndim == parameters[name].ndim and slot.size > 1
            found[key] = part(topology, name, slot, parameters[name]) if like_it else slot
    return found
