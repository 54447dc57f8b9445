"""Where a step's record goes: always ``metrics.jsonl``; W&B and TensorBoard when asked. One rank writes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.config.schema import Config
from gpt.runs.run_dir import Job
from gpt.utils.console import say

Record = dict[str, Any]


class Logger:
    """A place for records. Nothing here raises once it is open: training does not die of logging."""

    def write(self, record: Record) -> None:
        """Take one record."""

    def saved(self, step: int) -> None:
        """A checkpoint is whole."""

    def sampled(self, step: int) -> None:
        """``samples.jsonl`` has a new text."""

    def close(self, status: str, code: int, why: str = "") -> None:
        """Finish; ``status`` and ``code`` as in ``result.json`` and of the process, ``why`` if it did not go well."""


@dataclass(frozen=True)
class LoggerSpec:
    """A logger's module declares one as ``LOGGER``; ``gpt.train.loggers.build`` discovers it.

    Attributes:
        name: for messages.
        enabled: whether a configuration asks for it.
        make: opens it for a training job.
        summarise: logs the figures of an evaluation at a step, in a process of its own.
        problems: what keeps it from being used on this machine, each a sentence with the remedy.
    """

    name: str
    enabled: Callable[[Config], bool]
    make: Callable[[Job], Logger]
    summarise: Callable[[Job, int, Record], None]
    problems: Callable[[], list[str]] = list


class Jsonl(Logger):
    """``metrics.jsonl``: one line per step, whole lines only, in one write each.

    On a full disk the lines wait in memory and follow when there is room.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._waiting = b""
        self._warned = False

    def write(self, record: Record) -> None:
        """Append one record; NaN and infinity become null, which JSON has."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._waiting += json.dumps(finite).encode() + b"\n"
        try:
            while self._waiting:
                written = os.write(self._descriptor, self._waiting)
                self._waiting = self._waiting[written:]
        except OSError as error:
            if not self._warned:
                say(f"WARNING: metrics.jsonl cannot be written ({error}); records wait in memory")
                self._warned = True

    def sync(self) -> None:
        """Make what is written durable, as a checkpoint does with the weights."""
        os.fsync(self._descriptor)

    def close(self, status: str, code: int, why: str = "") -> None:
        """Close the file."""
        os.close(self._descriptor)
