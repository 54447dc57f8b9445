"""Encode documents to tokens, one chunk at a time, in worker processes.

A chunk becomes ``N.ids`` (raw tokens) and ``N.npz`` (per sentence, per document, and a note), which is written last
and gets its name only when complete: after a kill, an existing ``N.npz`` is valid.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gpt.config.task_schemas import Prepare, TextFormat
from gpt.data.preprocess.documents import PIECE_BYTES, Record, records, sentence_splitter, text_of
from gpt.data.preprocess.inputs import Source
from gpt.data.tokenizer import Encoder, open_encoder
from gpt.utils.errors import UserError
from gpt.utils.files import TEMPORARY
from gpt.utils.signals import die_with_parent

BAD_SHOWN = 5  # bad records of a chunk that are listed with their line; the others are counted


@dataclass(frozen=True)
class Chunk:
    """A part of the input: ``(source, first byte, end)``, ``(source, row group, -1)``, or the records themselves."""

    number: int
    span: tuple[int, int, int] | None
    loose: list[tuple[int, Record]]
    progress: int  # bytes of the input up to its end


@dataclass(frozen=True)
class PreprocessPlan:
    """Settings shared by all chunks. ``verbatim`` keeps blank documents and NUL bytes and refuses bad records."""

    sources: list[Source]
    settings: Prepare
    tokenizer: Path
    folder: Path
    piece_bytes: int = PIECE_BYTES
    verbatim: bool = False


def read(chunk: Chunk, plan: PreprocessPlan) -> Iterator[tuple[int, Record]]:
    """Yield the records of a chunk, each with the number of its source."""
    if chunk.span is None:
        yield from chunk.loose
        return
    number, first, end = chunk.span
    source = plan.sources[number]
    if source.format is TextFormat.parquet:
        yield from ((number, record) for record in _rows(source, first, plan.settings.json_key))
        return
    with open(source.path, "rb") as file:
        file.seek(first)
        for record in records(file, source, plan.settings, end):
            yield number, record


def _rows(source: Source, group: int, column: str) -> Iterator[Record]:
    from pyarrow import parquet

    with parquet.ParquetFile(source.path) as file:
        row = sum(file.metadata.row_group(g).num_rows for g in range(group))
        for batch in file.iter_batches(1024, row_groups=[group], columns=[column]):
            for text in batch.column(0).to_pylist():
                row += 1
                if isinstance(text, str):
                    yield Record(row, text.encode())
                else:
                    yield Record(row, None, why=f"{column!r} is {type(text).__name__}, not text")


def encode(chunk: Chunk, plan: PreprocessPlan, encoder: Encoder) -> dict[str, Any]:
    """Encode a chunk, write its two files and return the note.

    Raises:
        UserError: a record is bad, and the plan is ``verbatim``.
    """
    settings = plan.settings
    split_sentences = sentence_splitter(settings)
    dtype = np.uint16 if encoder.vocab <= 1 << 16 else np.int32
    lens: list[int] = []
    docs: list[int] = []
    sizes: list[int] = []
    hashes = bytearray()
    note: dict[str, Any] = {"records": 0, "bad": 0, "leading_bad": 0, "empty": 0, "short": 0, "shown": [], "line": 0}
    temporary = plan.folder / f"{TEMPORARY}{chunk.number}-{os.getpid()}"
    with open(temporary, "wb") as out:
        for number, record in read(chunk, plan):
            if settings.limit is not None and len(docs) >= settings.limit:
                break
            source = plan.sources[number]
            note["line"] = record.line
            if record.raw is not None and source.format is TextFormat.jsonl and not record.raw.strip():
                continue
            note["records"] += 1
            text, why = "", record.why
            if record.raw is not None:
                text, why = text_of(record.raw, source, settings, allow_nul=plan.verbatim)
            if why and plan.verbatim:
                raise UserError(f"{source.path}:{record.line}: {why}: convert or leave it out")
            if why:
                note["bad"] += 1
                note["leading_bad"] += not (docs or note["empty"] or note["short"])
                if len(note["shown"]) < BAD_SHOWN:
                    note["shown"].append((number, record.line, why))
                continue
            if not text.strip() and not plan.verbatim:
                note["empty"] += 1
                continue
            if len(text) < settings.min_length:
                note["short"] += 1
                continue
            rows = [encoder.encode(part) for part in split_sentences(text)]
            if record.ends and settings.append_eot and encoder.eot is not None:
                rows[-1] = np.append(rows[-1], encoder.eot)
            raw = text.encode()
            lens += [len(row) for row in rows]
            docs.append(len(rows))
            sizes.append(len(raw))
            hashes += hashlib.blake2b(raw, digest_size=16).digest()
            out.write(b"".join(row.astype(dtype).tobytes() for row in rows))
    note["documents"] = len(docs)
    note["text"] = sum(sizes)
    os.replace(temporary, plan.folder / f"{chunk.number}.ids")
    with open(temporary, "wb") as out:
        np.savez(
            out,
            lens=np.array(lens, np.int32),
            docs=np.array(docs, np.int32),
            sizes=np.array(sizes, np.int32),
            hashes=np.frombuffer(bytes(hashes), np.uint64).reshape(-1, 2),
            note=np.frombuffer(json.dumps(note).encode(), np.uint8),
        )
    os.replace(temporary, plan.folder / f"{chunk.number}.npz")
    return note


def finished(folder: Path, number: int) -> dict[str, Any] | None:
    """Return the note of a finished chunk."""
    with contextlib.suppress(FileNotFoundError), np.load(folder / f"{number}.npz", allow_pickle=False) as stored:
        note: dict[str, Any] = json.loads(stored["note"].tobytes())
        return note
    return None


def encode_in_workers(
    chunks: Iterable[Chunk], plan: PreprocessPlan, workers: int
) -> Generator[tuple[Chunk, dict[str, Any]], None, None]:
    """Yield the chunks in their order, each with its note; at most a few are read ahead.

    Raises:
        OSError: a worker could not write, or was killed.
    """
    # Unlike multiprocessing.Pool, whose imap waits forever, this pool notices a worker that was killed.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (plan,))
    pending: deque[tuple[Chunk, Future[dict[str, Any]]]] = deque()

    def submit(chunk: Chunk) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = Future()
        if note := finished(plan.folder, chunk.number):
            future.set_result(note)
            return future
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C ends this process alone
        try:
            return pool.submit(_encode_chunk, chunk)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    try:
        for chunk in chunks:
            pending.append((replace(chunk, loose=[]), submit(chunk)))
            while pending and (len(pending) >= 4 * workers or pending[0][1].done()):
                first, future = pending.popleft()
                yield first, future.result()
        for first, future in pending:
            yield first, future.result()
    except BrokenProcessPool:
        raise ChildProcessError(
            "a worker of the preparation was killed, perhaps out of memory; the same command continues"
        ) from None
    finally:
        for process in multiprocessing.active_children():  # a chunk that is being encoded is not waited for
            process.kill()
        pool.shutdown(cancel_futures=True)


_worker: tuple[PreprocessPlan, Encoder]  # of a worker process


def _start_worker(plan: PreprocessPlan) -> None:
    global _worker  # noqa: PLW0603
    if (parent := multiprocessing.parent_process()) and parent.pid:
        die_with_parent(parent.pid)
    _worker = plan, open_encoder(plan.tokenizer)


def _encode_chunk(chunk: Chunk) -> dict[str, Any]:
    try:
        return encode(chunk, *_worker)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(_worker[0].folder)) from error
