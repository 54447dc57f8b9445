"""Merge finished chunks into one set or two: order, duplicates, validation split."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gpt.data.preprocess.encode import PreprocessPlan
from gpt.data.sampler import permute
from gpt.data.token_files import write_header
from gpt.data.tokenizer import Encoder
from gpt.utils.arrays import Array

FILES = ("_ids.npy", "_idx.npz")
VAL = "_val"
BLOCK = 1 << 16  # documents put in order together
WRITE_BYTES = 4 << 20
OPEN_FILES = 64


class _Tables:
    """Tables over all chunks: hash, text bytes, sentences and tokens of each document; first document of each chunk."""

    def __init__(self, folder: Path, count: int, limit: int | None) -> None:
        lens, docs, sizes, hashes = [], [], [], []
        for number in range(count):
            with np.load(folder / f"{number}.npz", allow_pickle=False) as stored:
                lens.append(stored["lens"])
                docs.append(stored["docs"])
                sizes.append(stored["sizes"])
                hashes.append(stored["hashes"])
        self.chunk_start = np.cumsum([0, *(len(d) for d in docs)])
        self.lens: Array = np.concatenate(lens) if lens else np.empty(0, np.int32)
        self.sentences: Array = np.concatenate(docs) if docs else np.empty(0, np.int32)
        self.sizes: Array = np.concatenate(sizes) if sizes else np.empty(0, np.int32)
        self.hashes: Array = np.concatenate(hashes) if hashes else np.empty((0, 2), np.uint64)
        self.first_sentence = np.cumsum(np.concatenate([[0], self.sentences]), dtype=np.int64)
        # Tokens of a document begin in its chunk's file at this one.
        begins = np.cumsum(np.concatenate([[0], self.lens]), dtype=np.int64)[self.first_sentence]
        self.tokens = np.diff(begins)
        self.chunk_of = np.repeat(np.arange(count), np.diff(self.chunk_start))
        self.begins = begins[:-1] - begins[self.chunk_start[self.chunk_of]]
        self.documents = len(self.sentences) if limit is None else min(limit, len(self.sentences))


def first_of_each(hashes: Array) -> Array:
    """Return which rows of [N, 2] are the first of their kind."""
    # A stable order by both halves puts equal rows together, the earliest first.
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    same = np.zeros(len(order), dtype=bool)
    same[1:] = (hashes[order[1:]] == hashes[order[:-1]]).all(axis=1)
    kept: Array = np.ones(len(order), dtype=bool)
    kept[order[same]] = False
    return kept


def merge(plan: PreprocessPlan, count: int, encoder: Encoder, seed: int) -> dict[str, dict[str, Any]]:
    """Write ``_ids.npy`` and ``_idx.npz`` of the set and of ``_val`` into the work folder; return figures of each."""
    settings = plan.settings
    tables = _Tables(plan.folder, count, settings.limit)
    n = tables.documents
    keep = first_of_each(tables.hashes[:n]) if settings.dedup else np.ones(n, dtype=bool)
    # A share of all 64-bit numbers: the same text is always on the same side.
    held_out = tables.hashes[:n, 0] < np.uint64(int(settings.val_share * 2**64))
    figures = {}
    for ending, side in (("", ~held_out), (VAL, held_out)):
        chosen = keep & side
        order = np.flatnonzero(chosen)
        if settings.shuffle:
            permuted = permute(np.arange(n), n, seed, 0) if n else order
            order = permuted[chosen[permuted]]
        figures[ending] = _write(plan, tables, order, encoder, ending)
        figures[ending]["duplicates"] = int((side & ~keep).sum())
    return figures


def _write(plan: PreprocessPlan, tables: _Tables, order: Array, encoder: Encoder, ending: str) -> dict[str, Any]:
    dtype = np.dtype(np.uint16 if encoder.vocab <= 1 << 16 else np.int32)
    counts = np.zeros(encoder.vocab, dtype=np.int64)
    files = _Files(plan.folder)
    ids_path, idx_path = (plan.folder / f"{ending}{name}" for name in FILES)
    try:
        with open(ids_path, "w+b") as out:
            write_header(out, dtype, 0)
            for start in range(0, len(order), BLOCK):
                rows: list[bytes] = []
                held = 0
                for document in order[start : start + BLOCK].tolist():
                    first, size = int(tables.begins[document]), int(tables.tokens[document])
                    raw = files.read(int(tables.chunk_of[document]), first * dtype.itemsize, size * dtype.itemsize)
                    rows.append(raw)
                    held += len(raw)
                    if held >= WRITE_BYTES:
                        rows, held = _flush(out, rows, dtype, counts), 0
                _flush(out, rows, dtype, counts)
            write_header(out, dtype, int(counts.sum()))
            out.flush()
            os.fsync(out.fileno())
    finally:
        files.close()
    kept = tables.sentences[order]
    docs = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
    within = np.arange(docs[-1]) - np.repeat(docs[:-1], kept)
    with open(idx_path, "wb") as out:
        np.savez(out, lens=tables.lens[np.repeat(tables.first_sentence[order], kept) + within], docs=docs)
        out.flush()
        os.fsync(out.fileno())
    size, total = int(tables.sizes[order].sum()), int(counts.sum())
    share = counts[counts > 0] / max(total, 1)
    return {
        "documents": len(order),
        "sentences": int(docs[-1]),
        "tokens": total,
        "bytes": size,
        "bytes_per_token": size / total if total else None,
        "unigram_entropy": float(-(share * np.log(share)).sum()),
    }


def _flush(out: BinaryIO, rows: list[bytes], dtype: np.dtype[Any], counts: Array) -> list[bytes]:
    """Write the rows, count their tokens and return an empty list for the next ones."""
    joined = b"".join(rows)
    counts += np.bincount(np.frombuffer(joined, dtype), minlength=len(counts))
    out.write(joined)
    return []


class _Files:
    """The chunks' token files, a few open at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[int, BinaryIO] = {}

    def read(self, number: int, first: int, size: int) -> bytes:
        """Return ``size`` bytes of chunk ``number`` from byte ``first``."""
        if number not in self._open:
            if len(self._open) >= OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            self._open[number] = open(self._folder / f"{number}.ids", "rb")  # noqa: SIM115
        return os.pread(self._open[number].fileno(), size, first)

    def close(self) -> None:
        """Close all files."""
        for file in self._open.values():
            file.close()
