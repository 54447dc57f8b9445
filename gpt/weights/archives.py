"""Tensors in other projects' files: named, shaped, and read when they are asked for, as float32 on the host.

Safetensors are read by mapping the file. ``.bin`` and ``.pdparams`` are pickles, which can run anything when they are
loaded; here they cannot: ``gpt.weights.pickles`` rebuilds tensors itself and refuses whatever else they ask for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt.config import UserError
from gpt.data.tokens import Array

# bfloat16 is unknown to numpy: its bits are the upper half of a float32's.
SAFETENSORS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bfloat16", "U8": "|u1", "I64": "<i8", "BOOL": "|b1"}


@dataclass(frozen=True)
class Tensor:
    """One of a file: its shape, and how to get its values."""

    shape: list[int]
    read: Callable[[], Array]


Tensors = dict[str, Tensor]


def values(raw: bytes | Array, dtype: str, shape: Sequence[int]) -> Array:
    """Float32 of bytes as a file holds them.

    Example:
        >>> values(bytes([0, 0, 0x80, 0x3F]), "bfloat16", [2]).tolist()
        [0.0, 1.0]
    """
    if dtype == "bfloat16":
        wide = np.frombuffer(raw, "<u2").astype("<u4") << 16
        return wide.view("<f4").reshape(shape)
    array: Array = np.frombuffer(raw, dtype).reshape(shape)
    return array.astype(np.float32, copy=False)


def open_file(path: Path) -> Tensors:
    """The tensors of a ``.safetensors``, ``.bin`` or ``.pdparams`` file.

    Raises:
        UserError: it is damaged, or a pickle that asks for more than tensors.
    """
    from gpt.weights import pickles

    try:
        if path.suffix == ".safetensors":
            return _safetensors(path)
        return pickles.paddle_file(path) if path.suffix == ".pdparams" else pickles.torch_file(path)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file leads to
        raise UserError(f"{path}: damaged or not a file of weights ({type(error).__name__}: {error})") from error


def _safetensors(path: Path) -> Tensors:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise ValueError(f"the header has {length:,} bytes, the file {size:,}")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    mapped: Array = np.memmap(path, np.uint8, "r")
    found = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        if end > size:
            raise ValueError(f"{name} ends at byte {end:,} of {size:,}")
        found[name] = _mapped(mapped[begin:end], entry["dtype"], entry["shape"])
    return found


def _mapped(raw: Array, dtype: str, shape: list[int]) -> Tensor:
    def read() -> Array:
        if dtype not in SAFETENSORS:
            raise UserError(f"a tensor of type {dtype}: convert the weights to float32, float16 or bfloat16 first")
        return values(raw, SAFETENSORS[dtype], shape)

    return Tensor(shape, read)


def sharded(index: Path) -> Tensors:
    """The tensors of all files that a ``*.index.json`` names.

    Raises:
        UserError: the index or one of its files is missing or damaged.
    """
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(Path(name).name) for name in weight_map.values()})
    except Exception as error:
        raise UserError(f"{index}: not an index of weights ({type(error).__name__}: {error})") from error
    found: Tensors = {}
    for name in names:
        file = index.parent / name
        if not file.is_file():
            raise UserError(f"{index.name} names {name}, which is not in {index.parent}")
        found |= open_file(file)
    absent = sorted(set(weight_map) - set(found))
    if absent:
        raise UserError(f"{index.name} names tensors that its files do not have: {', '.join(absent[:5])}")
    return found
