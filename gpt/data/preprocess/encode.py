"""Documents to tokens, one chunk at a time: what a worker does, and the workers.

A chunk becomes ``N.ids`` (raw tokens) and ``N.npz`` (per sentence, per document, and a note), written last and under
its name only when whole: what is there after a kill is finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import select
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gpt.config.task_schemas import Prepare, TextFormat
from gpt.data.preprocess.documents import Record, divider, records, text_of
from gpt.data.preprocess.inputs import Source
from gpt.data.tokenizer import Encoder, open_encoder
from gpt.utils.files import TEMPORARY

BAD_SHOWN = 5  # bad records of a chunk that are told with their line; the others are counted


@dataclass(frozen=True)
class Chunk:
    """A piece of work: ``(source, first byte, end)``, ``(source, row group, -1)``, or the records themselves."""

    number: int
    span: tuple[int, int, int] | None
    loose: list[tuple[int, Record]]
    progress: int  # bytes of the input that are behind once this is done


@dataclass(frozen=True)
class Setup:
    """What all chunks have in common."""

    sources: list[Source]
    settings: Prepare
    tokenizer: Path
    folder: Path


def read(chunk: Chunk, setup: Setup) -> Iterator[tuple[int, Record]]:
    """The records of a chunk, each with the number of its source."""
    if chunk.span is None:
        yield from chunk.loose
        return
    number, first, end = chunk.span
    source = setup.sources[number]
    if source.format is TextFormat.parquet:
        yield from ((number, record) for record in _rows(source, first, setup.settings.json_key))
        return
    with open(source.path, "rb") as file:
        file.seek(first)
        for record in records(file, source, setup.settings, end):
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


def encode(chunk: Chunk, setup: Setup, encoder: Encoder) -> dict[str, Any]:
    """Encode a chunk and write its two files; returns the note."""
    settings = setup.settings
    divide = divider(settings)
    dtype = np.uint16 if encoder.vocab <= 1 << 16 else np.int32
    lens: list[int] = []
    docs: list[int] = []
    sizes: list[int] = []
    hashes = bytearray()
    note: dict[str, Any] = {"records": 0, "bad": 0, "leading_bad": 0, "empty": 0, "short": 0, "shown": [], "line": 0}
    temporary = setup.folder / f"{TEMPORARY}{chunk.number}-{os.getpid()}"
    with open(temporary, "wb") as out:
        for number, record in read(chunk, setup):
            if settings.limit is not None and len(docs) >= settings.limit:
                break
            source = setup.sources[number]
            note["line"] = record.line
            if record.raw is not None and source.format is TextFormat.jsonl and not record.raw.strip():
                continue
            note["records"] += 1
            text, why = ("", record.why) if record.raw is None else text_of(record.raw, source, settings)
            if why:
                note["bad"] += 1
                note["leading_bad"] += not (docs or note["empty"] or note["short"])
                if len(note["shown"]) < BAD_SHOWN:
                    note["shown"].append((number, record.line, why))
                continue
            if not text.strip():
                note["empty"] += 1
                continue
            if len(text) < settings.min_length:
                note["short"] += 1
                continue
            rows = [encoder.encode(part) for part in divide(text)]
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
    os.replace(temporary, setup.folder / f"{chunk.number}.ids")
    with open(temporary, "wb") as out:
        np.savez(
            out,
            lens=np.array(lens, np.int32),
            docs=np.array(docs, np.int32),
            sizes=np.array(sizes, np.int32),
            hashes=np.frombuffer(bytes(hashes), np.uint64).reshape(-1, 2),
            note=np.frombuffer(json.dumps(note).encode(), np.uint8),
        )
    os.replace(temporary, setup.folder / f"{chunk.number}.npz")
    return note


def finished(folder: Path, number: int) -> dict[str, Any] | None:
    """The note of a chunk that is done."""
    with contextlib.suppress(FileNotFoundError), np.load(folder / f"{number}.npz", allow_pickle=False) as stored:
        note: dict[str, Any] = json.loads(stored["note"].tobytes())
        return note
    return None


class Workers:
    """Processes that encode. Each ends by itself when this one is gone, since its standard input then ends."""

    def __init__(self, setup: Setup, count: int) -> None:
        root = str(Path(__file__).resolve().parents[3])
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-m", "gpt.data.preprocess.worker"]
        pipe = subprocess.PIPE
        self._idle = [
            subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env, start_new_session=True) for _ in range(count)
        ]
        self._all = list(self._idle)
        self._busy: dict[int, tuple[subprocess.Popen[bytes], int]] = {}
        for process in self._all:
            _send(process, setup)

    def run(self, chunks: Iterator[Chunk], folder: Path) -> Iterator[tuple[Chunk, dict[str, Any]]]:
        """Notes in the order of the chunks; never more than a few chunks are read ahead.

        Raises:
            OSError: a worker could not write, or died.
        """
        waiting: dict[int, tuple[Chunk, dict[str, Any] | None]] = {}
        due, more = 0, True
        while True:
            while more and self._idle and len(waiting) < 4 * len(self._all):
                chunk = next(chunks, None)
                if chunk is None:
                    more = False
                    break
                note = finished(folder, chunk.number)
                waiting[chunk.number] = (Chunk(chunk.number, chunk.span, [], chunk.progress), note)
                if note is None:
                    process = self._idle.pop()
                    assert process.stdout is not None
                    self._busy[process.stdout.fileno()] = (process, chunk.number)
                    _send(process, chunk)
                else:
                    break
            while due in waiting and waiting[due][1] is not None:
                chunk, note = waiting.pop(due)
                assert note is not None
                due += 1
                yield chunk, note
            if not waiting and not more:
                return
            if self._busy and (not self._idle or not more or len(waiting) >= 4 * len(self._all)):
                self._collect(waiting)

    def _collect(self, waiting: dict[int, tuple[Chunk, dict[str, Any] | None]]) -> None:
        for descriptor in select.select(list(self._busy), [], [])[0]:
            process, number = self._busy.pop(descriptor)
            assert process.stdout is not None
            try:
                answer = pickle.load(process.stdout)
            except EOFError:
                ended = f"a worker of the preparation ended with {process.wait()} (-9: killed, perhaps out of memory)"
                raise ChildProcessError(f"{ended}; the same command goes on") from None
            if isinstance(answer, OSError):
                raise answer
            if isinstance(answer, BaseException):
                raise RuntimeError(f"chunk {number}: {answer}") from answer
            waiting[number] = (waiting[number][0], answer)
            self._idle.append(process)

    def close(self) -> None:
        """End them all."""
        for process in self._all:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream:
                    with contextlib.suppress(OSError):
                        stream.close()


def _send(process: subprocess.Popen[bytes], what: object) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # its end is noticed when its answer is read
        pickle.dump(what, process.stdin)
        process.stdin.flush()


def main() -> None:
    """In a worker: chunks in, notes out."""
    inbox: BinaryIO = sys.stdin.buffer
    outbox = io.FileIO(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    try:
        setup: Setup = pickle.load(inbox)
        encoder = open_encoder(setup.tokenizer)
        while True:
            chunk: Chunk = pickle.load(inbox)
            try:
                answer: object = encode(chunk, setup, encoder)
            except OSError as error:
                answer = OSError(error.errno, error.strerror, str(setup.folder))
            except Exception as error:
                answer = RuntimeError(f"{type(error).__name__}: {error}")
            outbox.write(pickle.dumps(answer))
    except EOFError:
        return
