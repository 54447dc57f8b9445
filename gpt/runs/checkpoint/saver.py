"""Asynchronous checkpoint saver: all ranks write in the background, rank 0 publishes.

    checkpoints/.tmp-step_00000020/      until it is renamed
        model-00000-of-00002.safetensors ...
        rank-00001.json                  of each rank: locked while it writes; then its files' sizes, hashes and slices

The ranks communicate through these files only, since a thread must not enter a collective beside the training. A rank
that fails writes the error, one that dies releases its lock, so rank 0 never waits in vain.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.runs.checkpoint import shard_files
from gpt.runs.checkpoint.checkpoint import FORMAT, KINDS, file_of, folder_of
from gpt.runs.checkpoint.reshard import TensorShards
from gpt.runs.run_dir import checkpoint_steps
from gpt.utils.files import TEMPORARY, atomic_directory, remove_directory, remove_leftovers, sync_directory

POLL_SECONDS = 0.05
# Of a rank without a report, although all copy their state at the same step: its disk is gone.
ABSENT_SECONDS = 120.0


@dataclass(frozen=True)
class CheckpointShard:
    """One rank's part of a checkpoint."""

    step: int
    model: TensorShards
    optimizer: TensorShards
    state: dict[str, Any]  # the same on all ranks
    tokenizer: Path | None = None


def _report_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"


def write_part(folder: Path, part: CheckpointShard, rank: int, ranks: int) -> dict[str, Any]:
    """Write a rank's files and then its report, and return the report; errors are in the report, never raised.

    Args:
        folder: temporary, shared by all ranks; it may exist.
        part: of this rank.
        rank: of this one.
        ranks: of the job.
    """
    path, hidden = _report_path(folder, rank), folder / f".rank-{rank:05d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(hidden, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.rename(hidden, path)  # visible only while locked or complete
            report = _write_files(folder, part, rank, ranks)
            file.write(json.dumps(report).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # rank 0 finds no report
        return _failure(rank, ranks, error)
    return report


def _failure(rank: int, ranks: int, error: Exception) -> dict[str, Any]:
    return {"error": f"rank {rank}: {error}" if ranks > 1 else f"{error}"}


def _write_files(folder: Path, part: CheckpointShard, rank: int, ranks: int) -> dict[str, Any]:
    """Write the files; return the report."""
    files: dict[str, Any] = {}
    index: dict[str, Any] = {}
    metadata = {"format": "gpt", "step": str(part.step), "config": json.dumps(part.state["config"])}
    try:
        for kind, pieces in zip(KINDS, (part.model, part.optimizer), strict=True):
            name = file_of(kind, rank, ranks)
            if pieces:
                files[name] = dataclasses.asdict(shard_files.write(folder / name, pieces, metadata))
            index[kind] = shard_files.build_index(name, pieces)
    except Exception as error:  # a thread must never die silently
        for kind in KINDS:  # so that the report has space
            with contextlib.suppress(OSError):
                (folder / file_of(kind, rank, ranks)).unlink(missing_ok=True)
        return _failure(rank, ranks, error)
    return {"files": files, "index": index}


def publish(run_dir: Path, folder: Path, part: CheckpointShard, own: dict[str, Any], ranks: int) -> None:
    """Wait for the parts of all ranks, then rename the folder to its final name; on rank 0.

    Args:
        run_dir: of the run.
        folder: temporary.
        part: of rank 0.
        own: its report.
        ranks: of the job.

    Raises:
        OSError: a part could not be written or its rank has ended; the folder is removed, other checkpoints stay.
        ValueError: the shards do not cover the arrays; likewise.
    """
    try:
        reports = _collect_reports(folder, own, ranks)
        problems = [report["error"] for report in reports if "error" in report]
        if problems:
            raise OSError("; ".join(problems))
        _complete(folder, part, reports)
        path = folder_of(run_dir, part.step)
        if path.exists():  # damaged, else the run would have resumed from it
            remove_directory(path)
        os.rename(folder, path)
        sync_directory(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _collect_reports(folder: Path, own: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    """Wait until no rank writes any more; return the reports of all."""
    reports = {0: own}
    deadline = time.monotonic() + ABSENT_SECONDS
    while True:
        for rank in set(range(ranks)) - set(reports):
            report = _read_report(_report_path(folder, rank))
            if report is None and time.monotonic() > deadline and not _report_path(folder, rank).exists():
                report = {"error": f"rank {rank} has not begun to write"}
            if report is not None:
                reports[rank] = report
        if len(reports) == ranks:
            return [reports[rank] for rank in range(ranks)]
        time.sleep(POLL_SECONDS)


def _read_report(path: Path) -> dict[str, Any] | None:
    """Return the report of a rank, one of an error if it died, or None while it writes or before it begins."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    except OSError as error:
        return {"error": str(error)}
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        report: dict[str, Any] = json.loads(os.read(descriptor, os.fstat(descriptor).st_size))
    except BlockingIOError:
        return None
    except (OSError, ValueError):
        return {"error": f"rank {int(path.stem[5:])} has ended, or could not say why its part is missing"}
    finally:
        os.close(descriptor)
    return report


def _complete(folder: Path, part: CheckpointShard, reports: list[dict[str, Any]]) -> None:
    """Write index, state, tokenizer and manifest, and remove the reports; on rank 0."""
    files = {name: facts for report in reports for name, facts in report["files"].items()}
    index = {kind: shard_files.merge_indexes([report["index"][kind] for report in reports]) for kind in KINDS}
    for name, value in (("index.json", index), ("state.json", part.state)):
        (folder / name).write_text(json.dumps(value, indent=1 if name == "state.json" else None), encoding="utf-8")
        files[name] = None
    if part.tokenizer:
        name = f"tokenizer{part.tokenizer.suffix}"
        shutil.copyfile(part.tokenizer, folder / name)
        files[name] = None
    facts = {name: known or dataclasses.asdict(_flushed(folder / name)) for name, known in sorted(files.items())}
    manifest = {"format": FORMAT, "step": part.step, "files": facts}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _flushed(folder / "manifest.json")
    for rank in range(len(reports)):
        _report_path(folder, rank).unlink(missing_ok=True)
    sync_directory(folder)


def write_alone(path: Path, part: CheckpointShard) -> None:
    """Write a checkpoint of one rank outside a run, complete or not at all.

    Raises:
        OSError: the disk is full or gone.
    """
    with atomic_directory(path) as folder:
        own = write_part(folder, part, rank=0, ranks=1)
        if "error" in own:
            raise OSError(own["error"])
        _complete(folder, part, [own])


def _flushed(path: Path) -> shard_files.FileDigest:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return shard_files.digest_file(path)


class Saver:
    """Writes this rank's part on a thread, one save at a time; rank 0 publishes and removes old checkpoints.

    Args:
        run_dir: of the run.
        keep: number of checkpoints to keep.
        say: called with a line for each failure.
        rank: of this one.
        ranks: of the job.
    """

    def __init__(self, run_dir: Path, keep: int, say: Callable[[str], None], rank: int = 0, ranks: int = 1) -> None:
        self.run_dir = run_dir
        self.keep = keep
        self.say = say
        self.rank, self.ranks = rank, ranks
        self.saved_step: int | None = None  # on the first rank
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        if rank == 0:  # no rank saves before all have made a step together
            remove_leftovers(run_dir / "checkpoints")

    def submit(self, part: CheckpointShard) -> None:
        """Wait for an earlier save, then start writing."""
        self.wait()
        self._thread = threading.Thread(target=self._save, args=(part,), name="checkpoint")
        self._thread.start()

    def wait(self) -> Exception | None:
        """Wait for the last save; on rank 0, return the error of any rank, or None."""
        if self._thread:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def _save(self, part: CheckpointShard) -> None:
        folder = folder_of(self.run_dir, part.step)
        folder = folder.with_name(f"{TEMPORARY}{folder.name}")
        own = write_part(folder, part, self.rank, self.ranks)
        if self.rank > 0:
            if "error" in own:
                self.say(f"WARNING: no part of checkpoint {part.step}: {own['error']}")
            return
        try:
            publish(self.run_dir, folder, part, own, self.ranks)
            self.saved_step = part.step
            for step in checkpoint_steps(self.run_dir)[: -self.keep]:
                remove_directory(folder_of(self.run_dir, step))
        except Exception as error:
            self._error = error
            text = f"checkpoint {part.step} could not be written ({error}); earlier checkpoints are intact"
            self.say(f"WARNING: {text}")
