"""Tensors in other projects' files: named, shaped, and read when they are asked for, as float32 on the host.

Safetensors are read by mapping the file. ``.bin`` and ``.pdparams`` are pickles, which can run anything when they are
loaded; the reader here rebuilds tensors itself and refuses whatever else they ask for.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
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

    try:
        if path.suffix == ".safetensors":
            return _safetensors(path)
        return paddle_file(path) if path.suffix == ".pdparams" else torch_file(path)
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


# Tensors out of pickles, of which nothing is run: what a pickle may name is listed here, and each is a class of ours.

STORAGES = {
    "FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "BFloat16Storage": "bfloat16",
    "LongStorage": "<i8", "IntStorage": "<i4", "ByteStorage": "|u1", "BoolStorage": "|b1",
}  # fmt: skip
TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # of the format before 1.6
NUMPY_TYPES = {"f2", "f4", "f8", "u2", "i4", "i8"}
BFLOAT16_AS = "u2"  # what Paddle makes of bfloat16


@dataclass(frozen=True)
class _Storage:
    """Numbers one after the other, somewhere in the file."""

    key: str
    dtype: str
    count: int

    @property
    def bytes(self) -> int:
        return self.count * _size(self.dtype)


@dataclass(frozen=True)
class _View:
    """A tensor on a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, raw: bytes) -> Array:
        """The tensor, of its storage's bytes; a stride must not lead out of them."""
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        if min((self.offset, *self.shape, *self.stride)) < 0 or (0 not in self.shape and last >= self.storage.count):
            raise ValueError(f"a tensor of shape {self.shape} reaches beyond its {self.storage.count} numbers")
        flat = values(raw, self.storage.dtype, [self.storage.count])
        steps = tuple(step * flat.itemsize for step in self.stride)
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, steps, writeable=False)


def _size(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


class _Restricted(pickle.Unpickler):
    """Knows what is listed, each a function or class of this module, and refuses everything else."""

    allowed: dict[tuple[str, str], Any]

    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Called for every name in a pickle."""
        if (module, name) in self.allowed:
            return self.allowed[module, name]
        raise UserError(
            f"{self._path}: refused, nothing of it was run: this pickle asks for {module}.{name}, "
            "which no file of weights needs; if you trust it, save the weights as safetensors where they come from"
        )


def _view(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _View:
    """For torch._utils._rebuild_tensor_v2."""
    return _View(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))


class _Torch(_Restricted):
    allowed = {  # noqa: RUF012
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _view,
        ("torch._utils", "_rebuild_parameter"): lambda view, *_: view,
        **{("torch", name): dtype for name, dtype in STORAGES.items()},
    }

    def persistent_load(self, pid: Any) -> _Storage:
        """The storages, which are not in the pickle."""
        kind, dtype, key, _, count, *_ = pid
        if kind != "storage" or dtype not in STORAGES.values():
            raise ValueError(f"{pid} is no storage of numbers")
        return _Storage(str(key), dtype, int(count))


def torch_file(path: Path) -> Tensors:
    """Of a ``.bin``, in either format."""
    if zipfile.is_zipfile(path):
        return _zipped(path)
    with open(path, "rb") as file:
        if _Torch(file, path).load() != TORCH_MAGIC:
            raise ValueError("not a file that torch saved")
        for _ in range(2):  # version, machine
            _Torch(file, path).load()
        state = _Torch(file, path).load()
        keys = [str(key) for key in _Torch(file, path).load()]
        views = _views(state)
        storages = {view.storage.key: view.storage for view in views.values()}
        begins, begin = {}, file.tell()
        for key in keys:
            begins[key] = begin + 8
            begin += 8 + storages[key].bytes
        if begin > path.stat().st_size:
            raise ValueError(f"it ends after {path.stat().st_size:,} of {begin:,} bytes")

    def read(storage: _Storage) -> bytes:
        with open(path, "rb") as again:
            again.seek(begins[storage.key])
            return again.read(storage.bytes)

    return _tensors(views, read)


def _zipped(path: Path) -> Tensors:
    with zipfile.ZipFile(path) as archive:
        head = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = head.removesuffix("data.pkl")
        views = _views(_Torch(io.BytesIO(archive.read(head)), path).load())
        order = folder + "byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise ValueError("it was saved on a big-endian machine")
        for view in views.values():
            size = archive.getinfo(f"{folder}data/{view.storage.key}").file_size
            if size != view.storage.bytes:
                raise ValueError(f"storage {view.storage.key} has {size:,} of {view.storage.bytes:,} bytes")

    def read(storage: _Storage) -> bytes:
        with zipfile.ZipFile(path) as again:
            return again.read(f"{folder}data/{storage.key}")

    return _tensors(views, read)


def _views(state: Any) -> dict[str, _View]:
    """Those of a state dict, or of the one inside a training checkpoint."""
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    views = {str(name): value for name, value in state.items() if isinstance(value, _View)}
    if not views:
        raise ValueError("there is no tensor in it")
    return views


def _tensors(views: dict[str, _View], read: Callable[[_Storage], bytes]) -> Tensors:
    def tensor(view: _View) -> Tensor:
        return Tensor(list(view.shape), lambda: view.of(read(view.storage)))

    return {name: tensor(view) for name, view in views.items()}


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
        """Float32 of the bytes of an array."""
        if self.order == ">":
            raise ValueError("it was saved on a big-endian machine")
        return values(raw, "bfloat16" if self.name == BFLOAT16_AS else f"<{self.name}", shape)


class _Numpy:
    """For an array of numpy."""

    dtype: _NumpyType

    def __init__(self, *_: Any) -> None:
        self.shape: list[int] = []

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, self.dtype, self.by_columns, self.raw = state
        self.shape = list(shape)

    def read(self) -> Array:
        """Its values."""
        if not self.by_columns:
            return self.dtype.values(self.raw, self.shape)
        turned: Array = self.dtype.values(self.raw, self.shape[::-1]).T
        return turned


class _Paddle(_Restricted):
    allowed = {  # noqa: RUF012
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "tuple"): tuple,
        ("numpy", "dtype"): _NumpyType,
        ("numpy", "ndarray"): _Numpy,
        # Bytes in pickles that Python 2 can read.
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
        **{(f"numpy.{core}.multiarray", "_reconstruct"): _Numpy for core in ("core", "_core")},
    }


def paddle_file(path: Path) -> Tensors:
    """Of a ``.pdparams``: a dict of arrays, or of (name, array)."""
    with open(path, "rb") as file:
        state = _Paddle(file, path).load()
    if not isinstance(state, dict):
        raise ValueError("there is no dict of parameters in it")
    if "UnpackBigParamInfor@@" in state:
        raise ValueError("its largest arrays are cut into pieces; save it again with protocol=4")
    arrays = {str(name): value[1] if isinstance(value, tuple) else value for name, value in state.items()}
    return {name: Tensor(array.shape, array.read) for name, array in arrays.items() if isinstance(array, _Numpy)}
