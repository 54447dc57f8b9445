"""Token files in Megatron's format, memory-mapped: ``{prefix}.bin`` and ``{prefix}.idx``.

``.bin`` is all token numbers in a row, no header. ``.idx``, little-endian: ``MMIDIDX``, two zeros, version 1 (uint64),
element type (uint8), sequences S and boundaries D = documents + 1 (uint64 each); then S lengths (int32), S byte
offsets into ``.bin`` (int64), D numbers of sequences before each document (int64), and in files for several modes S
bytes more, which say nothing about tokens.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt.config import UserError
from gpt.files import atomic_files

Array = npt.NDArray[Any]
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# 6 and 7 are floating point, which no tokenizer makes.
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
BLOCK = 1 << 24  # tokens written together


def read(ids_path: Path, idx_path: Path) -> tuple[Array, Array, Array]:
    """Map a pair; nothing of it is copied into memory.

    Args:
        ids_path: the ``.bin``.
        idx_path: the ``.idx``.

    Returns:
        Token numbers, tokens of each sequence (int32), sequences before each document (int64, documents + 1).

    Raises:
        UserError: a file is damaged or cut short, or the two do not belong together.
    """
    size = idx_path.stat().st_size
    with open(idx_path, "rb") as file:
        head = file.read(HEADER.size)
    if not head.startswith(MAGIC) or len(head) < HEADER.size:
        raise UserError(f"{idx_path}: this is no Megatron index: it does not begin with MMIDIDX and a header")
    _, version, code, sequences, boundaries = HEADER.unpack(head)
    if version != 1 or code not in DTYPES:
        raise UserError(
            f"{idx_path}: version {version}, element type {code}; "
            f"version 1 with integer tokens (types {', '.join(map(str, DTYPES))}) can be read"
        )
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if size not in (expected, expected + sequences):
        raise UserError(
            f"{idx_path} is damaged: {size:,} bytes, but {sequences:,} sequences and {boundaries - 1:,} documents "
            f"take {expected:,}; prepare or copy it again"
        )
    index = np.memmap(idx_path, mode="r")
    dtype = np.dtype(DTYPES[code])
    cuts = HEADER.size + np.cumsum([0, 4 * sequences, 8 * sequences, 8 * boundaries])
    lens = index[cuts[0] : cuts[1]].view("<i4")
    offsets = index[cuts[1] : cuts[2]].view("<i8")
    docs = index[cuts[2] : cuts[3]].view("<i8")
    held, tokens = ids_path.stat().st_size, int(lens.sum(dtype=np.int64))
    if held != tokens * dtype.itemsize:
        raise UserError(
            f"{ids_path} is damaged: {held:,} bytes, but its index describes {tokens:,} tokens "
            f"of {dtype.itemsize} bytes; prepare or copy it again"
        )
    if len(lens) and (offsets[0] or (np.diff(offsets) != lens[:-1] * np.int64(dtype.itemsize)).any()):
        raise UserError(f"{idx_path} is damaged: its offsets are not those of sequences one after another")
    ids = np.memmap(ids_path, dtype, mode="r") if tokens else np.empty(0, dtype)
    return ids, lens, docs


def write(prefix: str, ids: Array, lens: Array, docs: Array, dtype: npt.DTypeLike) -> tuple[Path, Path]:
    """Write a pair, both files or neither.

    Args:
        prefix: of the files.
        ids: token numbers.
        lens: tokens of each sequence.
        docs: number of sequences before each document, and in all.
        dtype: of the file; it must hold the largest number.

    Returns:
        The two paths.
    """
    paths = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    code = next(code for code, name in DTYPES.items() if np.dtype(name) == dtype)
    ends = np.cumsum(lens, dtype=np.int64)
    with atomic_files(*paths) as (bin_path, idx_path):
        with open(bin_path, "wb") as file:
            for start in range(0, len(ids), BLOCK):
                file.write(ids[start : start + BLOCK].astype(dtype).data)
        with open(idx_path, "wb") as file:
            file.write(HEADER.pack(MAGIC, 1, code, len(lens), len(docs)))
            file.write(np.ascontiguousarray(lens, "<i4").data)
            file.write(((ends - lens) * np.dtype(dtype).itemsize).data)
            file.write(np.ascontiguousarray(docs, "<i8").data)
    return paths
