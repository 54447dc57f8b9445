"""Merge finished chunks into one set or two: order, duplicates, validation split."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np

from gpt.data.preprocess.encode import PreprocessPlan
from gpt.data.sampler import permute
from gpt.data.token_files import write_header
from gpt.data.tokenizer import Encoder
from gpt.utils.arrays import Array

FILES = ("_ids.npy", "_idx.npz")
VAL = "_val"
WRITE_TOKENS = 2 << 20  # written together
OPEN_FILES = 64


class _Tables:
    """Tables over all chunks: hash, text bytes, sentences and tokens of each document; first document of each chunk."""

    def __init__(self, folder: Path, count: int, limit: int | None) -> None:
        empty = {"lens": np.int32, "docs": np.int32, "sizes": np.int32}
        parts: dict[str, list[Array]] = {name: [np.empty(0, dtype)] for name, dtype in empty.items()}
        parts["hashes"] = [np.empty((0, 2), np.uint64)]
        for number in range(count):
            with np.load(folder / f"{number}.npz", allow_pickle=False) as stored:
                for name, arrays in parts.items():
                    arrays.append(stored[name])
        self.chunk_start = np.cumsum([len(docs) for docs in parts["docs"]])
        self.lens, self.sentences, self.sizes, self.hashes = map(np.concatenate, parts.values())
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
    ids_path, idx_path = (plan.folder / f"{ending}{name}" for name in FILES)

    @functools.lru_cache(OPEN_FILES)
    def chunk_ids(number: int) -> Array:
        return np.memmap(plan.folder / f"{number}.ids", dtype, mode="r")

    ends = np.cumsum(tables.tokens[order])
    cuts = np.searchsorted(ends, np.arange(WRITE_TOKENS, ends[-1] if len(ends) else 0, WRITE_TOKENS))
    with open(ids_path, "wb") as out:
        write_header(out, dtype, 0)
        for documents in np.split(order, cuts):
            rows = [np.empty(0, dtype)]
            places = zip(tables.chunk_of[documents], tables.begins[documents], tables.tokens[documents], strict=True)
            for chunk, begin, size in places:
                if size:  # an empty file cannot be mapped; a copy keeps no file open
                    rows.append(np.array(chunk_ids(int(chunk))[begin : begin + size]))
            joined = np.concatenate(rows)
            counts += np.bincount(joined, minlength=len(counts))
            out.write(joined.data)
        write_header(out, dtype, int(counts.sum()))
        out.flush()
        os.fsync(out.fileno())
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
