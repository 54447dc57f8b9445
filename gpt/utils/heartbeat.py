"""Where a rank is, in a file of fixed size that whoever watches the job can read: ``logs/worker.R.heartbeat``.

A collective that one rank never enters blocks all others without an error. Only the places of all ranks, side by side,
tell who is missing; so every rank notes its place before it may have to wait for others.

Call ``beat`` where a phase begins (forward, reduce, update, evaluate, save) and, in phases of many minutes, now and
then: a rank that does not beat for ``cluster.hang_seconds`` counts as stuck.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

RECORD_BYTES = 160  # overwritten in place: no new space on a full disk, and a reader never sees a short file


@dataclass(frozen=True)
class Beat:
    """The last place of a rank. ``count`` numbers its beats, which orders the phases of one step."""

    step: int
    phase: str
    count: int
    time: float  # seconds since the epoch

    @property
    def place(self) -> tuple[int, int]:
        """For comparison between ranks: all pass through the same phases in the same order."""
        return self.step, self.count


class _Writer:
    """This process's open file, if it has one."""

    descriptor = -1
    count = 0


def file_of(log_dir: Path, rank: int) -> Path:
    """Where a rank's heartbeat is."""
    return log_dir / f"worker.{rank}.heartbeat"


def begin(log_dir: Path, rank: int) -> None:
    """Open this rank's file; before this, and where it is not possible, ``beat`` does nothing."""
    with contextlib.suppress(OSError):
        log_dir.mkdir(parents=True, exist_ok=True)
        _Writer.descriptor = os.open(file_of(log_dir, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        _Writer.count = 0


def beat(step: int, phase: str) -> None:
    """Note that this rank has come to ``phase`` of ``step``; a few microseconds, never an error.

    Example:
        >>> beat(7, "forward")
    """
    if _Writer.descriptor < 0:
        return
    _Writer.count += 1
    record = json.dumps({"step": step, "phase": phase[:40], "count": _Writer.count, "time": time.time()})
    with contextlib.suppress(OSError):
        os.pwrite(_Writer.descriptor, record.encode().ljust(RECORD_BYTES - 1) + b"\n", 0)


def read(log_dir: Path, rank: int) -> Beat | None:
    """The last beat of a rank, or None before its first."""
    try:
        return Beat(**json.loads(file_of(log_dir, rank).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def clear(log_dir: Path) -> None:
    """Remove the heartbeats of an earlier start."""
    for path in log_dir.glob("worker.*.heartbeat"):
        path.unlink(missing_ok=True)
