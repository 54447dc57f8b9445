"""Tensors in other projects' files: names, shapes, and values read on demand as float32.

Safetensors are mapped into memory. ``.pdparams`` files are pickles, which can run anything when they are loaded; the
unpickler here rebuilds arrays itself and refuses whatever else they ask for.
"""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from gpt.utils.arrays import Array
from gpt.utils.errors import UserError

# bfloat16 is unknown to numpy: its bits are the upper half of a float32's.
SAFETENSORS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bfloat16", "U8": "|u1", "I64": "<i8", "BOOL": "|b1"}
NUMPY_TYPES = {"f2", "f4", "f8", "u2", "i4", "i8"}
BFLOAT16_AS = "u2"  # the type of numpy in which Paddle saves bfloat16


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: its shape, and a function that reads its values."""

    shape: list[int]
    read: Callable[[], Array]


Tensors = dict[str, Tensor]


def values(raw: bytes | Array, dtype: str, shape: Sequence[int]) -> Array:
    """Convert the bytes of a tensor to float32.

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
    """Open a ``.safetensors`` or ``.pdparams`` file.

    Raises:
        UserError: it is damaged, of another kind, or a pickle that asks for more than arrays.
    """
    if path.suffix == ".bin":
        raise UserError(
            f"{path}: torch's .bin files are pickles and are not read: write safetensors with "
            "transformers' from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) and import that folder"
        )
    try:
        return _pdparams(path) if path.suffix == ".pdparams" else _safetensors(path)
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
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        if end > size:
            raise ValueError(f"{name} ends at byte {end:,} of {size:,}")
        tensors[name] = _mapped(mapped[begin:end], entry["dtype"], entry["shape"])
    return tensors


def _mapped(raw: Array, dtype: str, shape: list[int]) -> Tensor:
    def read() -> Array:
        if dtype not in SAFETENSORS:
            raise UserError(f"a tensor of type {dtype}: convert the weights to float32, float16 or bfloat16 first")
        return values(raw, SAFETENSORS[dtype], shape)

    return Tensor(shape, read)


def open_shards(index: Path) -> Tensors:
    """Open all files that a ``*.index.json`` names.

    Raises:
        UserError: the index or one of its files is missing or damaged.
    """
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(Path(name).name) for name in weight_map.values()})
    except Exception as error:
        raise UserError(f"{index}: not an index of weights ({type(error).__name__}: {error})") from error
    tensors: Tensors = {}
    for name in names:
        file = index.parent / name
        if not file.is_file():
            raise UserError(f"{index.name} names {name}, which is not in {index.parent}")
        tensors |= open_file(file)
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise UserError(f"{index.name} names tensors that its files do not have: {', '.join(absent[:5])}")
    return tensors


class _NumpyType:
    """For numpy.dtype."""

    def __init__(self, name: str, *_: Any) -> None:
        if name not in NUMPY_TYPES:
            raise ValueError(f"an array of type {name}")
        self.name = name
        self.order = "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def values(self, raw: bytes, shape: list[int]) -> Array:
        """Convert the bytes of an array to float32."""
        if self.order == ">":
            raise ValueError("it was saved on a big-endian machine")
        return values(raw, "bfloat16" if self.name == BFLOAT16_AS else f"<{self.name}", shape)


class _Numpy:
    """For numpy.ndarray."""

    dtype: _NumpyType

    def __init__(self, *_: Any) -> None:
        self.shape: list[int] = []

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, self.dtype, self.by_columns, self.raw = state
        self.shape = list(shape)

    def read(self) -> Array:
        """Return the values."""
        if not self.by_columns:
            return self.dtype.values(self.raw, self.shape)
        transposed: Array = self.dtype.values(self.raw, self.shape[::-1]).T
        return transposed


class _Unpickler(pickle.Unpickler):
    """Knows what is listed, each a function or class of this module, and refuses everything else."""

    allowed = {  # noqa: RUF012
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "tuple"): tuple,
        ("numpy", "dtype"): _NumpyType,
        ("numpy", "ndarray"): _Numpy,
        # Bytes in pickles that Python 2 can read.
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
        **{(f"numpy.{core}.multiarray", "_reconstruct"): _Numpy for core in ("core", "_core")},
    }

    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Resolve a name of the pickle."""
        if (module, name) in self.allowed:
            return self.allowed[module, name]
        raise UserError(
            f"{self._path}: refused, nothing of it was run: this pickle asks for {module}.{name}, "
            "which no file of weights needs; if you trust it, save its arrays alone where they come from"
        )


def _pdparams(path: Path) -> Tensors:
    """Read a dict of arrays, or of (name, array)."""
    with open(path, "rb") as file:
        state = _Unpickler(file, path).load()
    if not isinstance(state, dict):
        raise ValueError("there is no dict of parameters in it")
    if "UnpackBigParamInfor@@" in state:
        raise ValueError("its largest arrays are cut into pieces; save it again with protocol=4")
    arrays = {str(name): value[1] if isinstance(value, tuple) else value for name, value in state.items()}
    return {name: Tensor(array.shape, array.read) for name, array in arrays.items() if isinstance(array, _Numpy)}
