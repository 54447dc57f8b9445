"""Files of tensor shards: written and hashed in one pass, read by slice across files.

Every file is plain safetensors: 8 bytes with the length of a JSON header, the header, the arrays one after the other.
It is written here and not by the library, so that the hash of the manifest costs no second reading.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt.runs.checkpoint.reshard import ShardRange, TensorShards
from gpt.utils.arrays import Array
from gpt.utils.files import sha256

DTYPES = {"float32": "F32"}  # the safetensors name
BLOCK_BYTES = 1 << 22
Index = dict[str, dict[str, Any]]  # of every array {"shape", "dtype", "pieces": [[file, axis, start, stop], ...]}


@dataclass(frozen=True)
class FileDigest:
    """Size and hash of a file, as in a manifest."""

    bytes: int
    sha256: str


def write(path: Path, pieces: TensorShards, metadata: dict[str, str]) -> FileDigest:
    """Write arrays to a new file and flush it to the disk.

    Raises:
        OSError: the disk is full or gone.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, piece in pieces.items():
        begin, end = end, end + piece.array.nbytes
        dtype = DTYPES[str(piece.array.dtype)]
        header[name] = {"dtype": dtype, "shape": list(piece.array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as file:
        head = np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)
        for array in (head, *(piece.array for piece in pieces.values())):
            for block in _blocks(array):
                digest.update(block)
                size += _write_all(file.fileno(), block)
        os.fsync(file.fileno())
    return FileDigest(size, digest.hexdigest())


def _blocks(array: Array) -> Iterator[memoryview]:
    view: memoryview = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    for i in range(0, len(view), BLOCK_BYTES):
        yield view[i : i + BLOCK_BYTES]


def _write_all(descriptor: int, block: memoryview) -> int:
    written = 0
    while written < len(block):
        written += os.write(descriptor, block[written:])
    return written


def digest_file(path: Path) -> FileDigest:
    """Return size and hash of a file.

    Raises:
        OSError: it cannot be read.
    """
    return FileDigest(path.stat().st_size, sha256(path))


def build_index(file: str, pieces: TensorShards) -> Index:
    """Return the index of one file."""
    return {
        name: {
            "shape": piece.shape,
            "dtype": str(piece.array.dtype),
            "pieces": [[file, piece.where.axis, piece.where.start, piece.where.stop]],
        }
        for name, piece in pieces.items()
    }


def merge_indexes(parts: list[Index]) -> Index:
    """Return one index of the files of all ranks.

    Raises:
        ValueError: ranks disagree on a shape, or the pieces of an array do not add up to it.
    """
    merged: Index = {}
    for part in parts:
        for name, entry in part.items():
            known = merged.setdefault(name, {**entry, "pieces": []})
            if known["shape"] != entry["shape"]:
                raise ValueError(f"{name} has shape {known['shape']} on one rank and {entry['shape']} on another")
            known["pieces"] += entry["pieces"]
    for name, entry in merged.items():
        entry["pieces"].sort(key=lambda piece: piece[2])
        end = 0
        for _, axis, start, stop in entry["pieces"]:
            if start != end or axis != entry["pieces"][0][1]:
                raise ValueError(f"{name} is not covered once by the slices {entry['pieces']}")
            end = stop
        if end != entry["shape"][entry["pieces"][0][1]]:
            raise ValueError(f"{name} of shape {entry['shape']} ends at {end} in {entry['pieces']}")
    return merged


class CheckpointReader(Mapping[str, Array]):
    """The arrays of a checkpoint: ``reader[name]`` is a global array, ``read`` a slice; reads no other bytes.

    Args:
        folder: of the checkpoint.
        index: of the arrays.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder = folder
        self.index = index
        self._files: dict[str, Any] = {}  # mapped into memory, not read

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Global shapes by name."""
        return {name: entry["shape"] for name, entry in self.index.items()}

    def __getitem__(self, name: str) -> Array:
        return self.read(name, ShardRange(0, 0, self.index[name]["shape"][0]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)

    def read(self, name: str, where: ShardRange) -> Array:
        """Return a slice of an array, assembled from the shards that overlap it."""
        entry = self.index[name]
        wanted = where.box(entry["shape"])
        array = np.empty([end - begin for begin, end in wanted], entry["dtype"])
        for file, *piece in entry["pieces"]:
            stored = ShardRange(*piece).box(entry["shape"])
            overlap = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(wanted, stored, strict=True)]
            if any(begin >= end for begin, end in overlap):
                continue
            in_file = tuple(slice(b - s, e - s) for (b, e), (s, _) in zip(overlap, stored, strict=True))
            part: Array = self._open(file).get_slice(name)[in_file]
            if overlap == wanted:
                return part
            array[tuple(slice(b - w, e - w) for (b, e), (w, _) in zip(overlap, wanted, strict=True))] = part
        return array

    def _open(self, file: str) -> Any:
        from safetensors import safe_open

        if file not in self._files:
            self._files[file] = safe_open(self.folder / file, framework="numpy")
        return self._files[file]
