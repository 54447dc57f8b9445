"""Token files, memory-mapped: ``{prefix}_ids.npy`` and ``{prefix}_idx.npz``, or Megatron's ``.bin`` and ``.idx``.

``ids`` is one row of token numbers (uint16 when the vocabulary fits, else int32), ``lens`` (int32) the tokens
of each sentence and ``docs`` (int64, documents + 1) the number of sentences before each document; without
sentence splitting a sentence is a document.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gpt.utils.arrays import Array
from gpt.utils.errors import UserError
from gpt.utils.files import atomic_files

SCAN_BLOCK = 1 << 24  # tokens read or written together; bounds the memory
# Megatron's index: the header, then lens (int32), byte offsets (int64) and docs (int64).
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# 6 and 7 are floating point, which no tokenizer makes.
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


@dataclass(frozen=True)
class TokenSet:
    """An open set. ``document_ends`` (int64) are positions in ``ids`` after each document."""

    prefix: str
    ids: Array
    document_ends: Array

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.document_ends)

    def fingerprint(self) -> str:
        """Return an identity of the content, from the document lengths and 64 blocks spread over the tokens.

        Reading every byte of a large corpus at each start would cost minutes; this costs milliseconds and
        detects a re-made corpus, another tokenizer and other documents.
        """
        digest = hashlib.sha256(f"{self.ids.dtype} {len(self.ids)}".encode())
        digest.update(np.ascontiguousarray(self.document_ends).data)
        for start in np.linspace(0, max(len(self.ids) - 2048, 0), 64, dtype=np.int64):
            digest.update(np.ascontiguousarray(self.ids[start : start + 2048]).data)
        return digest.hexdigest()[:16]

    def largest_id(self) -> int:
        """Return the largest token number, block by block (0.05 s for 300M tokens).

        Raises:
            UserError: a token number is negative.
        """
        largest = 0
        for start in range(0, len(self.ids), SCAN_BLOCK):
            block = self.ids[start : start + SCAN_BLOCK]
            largest = max(largest, int(block.max()))
            if block.dtype.kind == "i" and (least := int(block.min())) < 0:
                raise UserError(
                    f"{self.prefix}: token {start + int(block.argmin()):,} is {least}, and no token number is negative"
                )
        return largest


def bare(prefix: str) -> str:
    """Return a prefix without the ending of one of the files."""
    for ending in ("_ids.npy", "_idx.npz", ".bin", ".idx"):
        prefix = prefix.removesuffix(ending)
    return prefix


def manifest_path(prefix: str) -> Path:
    """Return the path of the manifest that ``task=prepare`` writes beside a set."""
    return Path(f"{bare(prefix)}_manifest.json")


def tokenizer_path(prefix: str) -> Path:
    """Return the path of the tokenizer beside a set: a ``tokenizer.json``, or a SentencePiece model."""
    model = Path(f"{bare(prefix)}_tokenizer.model")
    return model if model.is_file() else model.with_suffix(".json")


def paths_of(prefix: str) -> tuple[Path, Path]:
    """Return the two files of a set: token numbers and index.

    ``prefix`` may be any of the four file names too. A bare prefix means the published format where both are there.

    Example:
        >>> [path.name for path in paths_of("/nowhere/corpus")]
        ['corpus_ids.npy', 'corpus_idx.npz']
        >>> [path.name for path in paths_of("/nowhere/corpus.idx")]
        ['corpus.bin', 'corpus.idx']
    """
    name = bare(prefix)
    published = Path(f"{name}_ids.npy"), Path(f"{name}_idx.npz")
    megatron_pair = Path(f"{name}.bin"), Path(f"{name}.idx")
    if prefix.endswith((".bin", ".idx")):
        return megatron_pair
    if any(map(Path.exists, megatron_pair)) and not any(map(Path.exists, published)):
        return megatron_pair
    return published


def prefixes_at(path: str) -> list[str]:
    """Return the prefixes that ``path`` means: itself, or all sets of a folder but the ``_val`` sets of others.

    Example:
        >>> prefixes_at("/nowhere/corpus")
        ['/nowhere/corpus']
    """
    folder = Path(path)
    if not folder.is_dir():
        for ending in ("_ids.npy", "_idx.npz"):
            path = path.removesuffix(ending)
        return [path]
    prefixes = {str(p).removesuffix("_idx.npz") for p in folder.glob("*_idx.npz")}
    prefixes |= {str(p).removesuffix(".idx") for p in folder.glob("*.idx")}
    return sorted(p for p in prefixes if p.removesuffix("_val") == p or p.removesuffix("_val") not in prefixes)


def read(prefix: str) -> tuple[Array, Array, Array]:
    """Open a set, sentences and all; the tokens stay on disk.

    Returns:
        Token numbers, tokens of each sentence, number of sentences before each document (documents + 1).

    Raises:
        UserError: a file is missing or damaged, or the two do not belong together.
    """
    ids_path, idx_path = paths_of(prefix)
    absent = [str(p) for p in (ids_path, idx_path) if not p.is_file()]
    if absent:
        raise UserError(f"no such token file: {' and '.join(absent)}")
    try:
        if ids_path.suffix == ".bin":
            ids, lens, docs = _read_megatron(ids_path, idx_path)
        else:
            ids = np.load(ids_path, mmap_mode="r", allow_pickle=False)
            with np.load(idx_path, allow_pickle=False) as index:
                lens = index["lens"]
                docs = index["docs"].astype(np.int64, copy=False) if "docs" in index else np.arange(len(lens) + 1)
    except UserError:
        raise
    except Exception as error:  # numpy raises ValueError, OSError, EOFError, KeyError, BadZipFile
        raise UserError(f"{prefix}: the token files are damaged ({error}); prepare or copy them again") from error
    problem = _damage(ids, lens, docs)
    if problem:
        raise UserError(f"{prefix}: {problem}; prepare or copy the token files again")
    return ids, lens, docs


def load(prefix: str) -> TokenSet:
    """Open a set; the tokens stay on disk.

    Raises:
        UserError: see ``read``.
    """
    ids, lens, docs = read(prefix)
    ends = np.cumsum(lens, dtype=np.int64)
    if len(docs) != len(lens) + 1 or (np.diff(docs) != 1).any():  # a document of several sentences, or of none
        ends = np.concatenate([[0], ends])[docs[1:]]
    return TokenSet(prefix, ids, ends)


def write(prefix: str, ids: Array, lens: Array, docs: Array, dtype: npt.DTypeLike) -> tuple[Path, Path]:
    """Write a set in the published format, both files or neither, and return their paths.

    ``lens``: tokens of each sentence; ``docs``: sentences before each document, and in all; ``dtype``: of the ids file.
    """
    paths = Path(f"{prefix}_ids.npy"), Path(f"{prefix}_idx.npz")
    with atomic_files(*paths) as (ids_path, idx_path):
        with open(ids_path, "wb") as file:
            write_header(file, np.dtype(dtype), len(ids))
            _write_ids(file, ids, dtype)
        with open(idx_path, "wb") as file:
            np.savez(file, lens=np.asarray(lens, np.int32), docs=np.asarray(docs, np.int64))
    return paths


def write_megatron(prefix: str, ids: Array, lens: Array, docs: Array, dtype: npt.DTypeLike) -> tuple[Path, Path]:
    """Write a set in Megatron's format; see ``write``."""
    paths = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    code = next(code for code, name in DTYPES.items() if np.dtype(name) == dtype)
    ends = np.cumsum(lens, dtype=np.int64)
    with atomic_files(*paths) as (bin_path, idx_path):
        with open(bin_path, "wb") as file:
            _write_ids(file, ids, dtype)
        with open(idx_path, "wb") as file:
            file.write(HEADER.pack(MAGIC, 1, code, len(lens), len(docs)))
            file.write(np.ascontiguousarray(lens, "<i4").data)
            file.write(((ends - lens) * np.dtype(dtype).itemsize).data)
            file.write(np.ascontiguousarray(docs, "<i8").data)
    return paths


def _write_ids(file: BinaryIO, ids: Array, dtype: npt.DTypeLike) -> None:
    for start in range(0, len(ids), SCAN_BLOCK):
        file.write(ids[start : start + SCAN_BLOCK].astype(dtype).data)


def write_header(file: BinaryIO, dtype: np.dtype[Any], length: int) -> None:
    """Write the header of a row of tokens; it has room for a longer length, so it can be written before and after."""
    file.seek(0)
    header = {"descr": dtype.str, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call]


def _read_megatron(ids_path: Path, idx_path: Path) -> tuple[Array, Array, Array]:
    """Map a pair; nothing of it is copied into memory."""
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
    size, tokens = ids_path.stat().st_size, int(lens.sum(dtype=np.int64))
    if size != tokens * dtype.itemsize:
        raise UserError(
            f"{ids_path} is damaged: {size:,} bytes, but its index describes {tokens:,} tokens "
            f"of {dtype.itemsize} bytes; prepare or copy it again"
        )
    if len(lens) and (offsets[0] or (np.diff(offsets) != lens[:-1] * np.int64(dtype.itemsize)).any()):
        raise UserError(f"{idx_path} is damaged: its offsets are not those of sequences one after another")
    ids = np.memmap(ids_path, dtype, mode="r") if tokens else np.empty(0, dtype)
    return ids, lens, docs


def _damage(ids: Array, lens: Array, docs: Array) -> str | None:
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        return f"the ids are {ids.dtype} of shape {ids.shape}, not one row of integers"
    if len(ids) == 0:
        return "there are no tokens"
    if lens.min(initial=0) < 0 or lens.sum(dtype=np.int64) != len(ids):
        return f"the lengths add up to {lens.sum(dtype=np.int64):,} tokens, but there are {len(ids):,}"
    if len(docs) < 2 or docs[0] != 0 or docs[-1] != len(lens) or (np.diff(docs) < 0).any():
        return f"the document boundaries do not cover the {len(lens):,} lengths"
    return None


def split_bounds(documents: int, shares: list[float]) -> list[int]:
    """Return the first document of each split, and the end: Megatron's rule.

    Shares are normalised, cumulated and rounded; the excess due to rounding is taken off every boundary but the first.

    Example:
        >>> split_bounds(1000, [949, 50, 1])
        [0, 949, 999, 1000]
    """
    total = sum(shares)
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + round(share / total * documents))
    excess = bounds[-1] - documents
    return [0, *(max(0, bound - excess) for bound in bounds[1:])]
