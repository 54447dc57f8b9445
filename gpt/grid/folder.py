"""A grid's own folder: which cells it has, what happened to them, their output. Several drivers may write to it.

grid.json                 name, command, and the cells: run name -> overrides, run folder
events.jsonl              a line per start and end of a cell: time, cell, attempt, and event
                          "started": slots; "ended": code; "pruned" (by a sweeper, instead of "ended"): code
cells/NAME.json           the cell's command, frozen
cells/NAME.log            what its driver printed
summary.csv, summary.json, report.html
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.config import Task
from gpt.files import Lock, append_json, json_lines, write_json
from gpt.grid.cells import Cell, State

STOPPED = (130, 143, -2, -15)  # exit codes of what was asked to end
ONCE = (Task.evaluate, Task.generate)  # of a trained run, until that has a newer checkpoint


@dataclass(frozen=True)
class Folder:
    """Of one grid."""

    path: Path

    def frozen(self, cell: Cell) -> Path:
        """The cell's command."""
        return self.path / "cells" / f"{cell.name}.json"

    def log(self, name: str) -> Path:
        """What the cell's driver printed."""
        return self.path / "cells" / f"{name}.log"

    def add(self, cells: Iterable[Cell], command: list[str]) -> None:
        """Write down and freeze cells; those that are there already stay."""
        (self.path / "cells").mkdir(parents=True, exist_ok=True)
        lock = Lock(self.path / ".lock")
        lock.acquire(patience=60.0)
        try:
            known = self.read()
            for cell in cells:
                about: dict[str, Any] = {"overrides": cell.overrides, "differs": cell.differs}
                about["run_dir"] = os.path.relpath(cell.run_dir.resolve(), self.path.resolve())  # both may be moved
                known["cells"][cell.name] = about
                cell.freeze(self.frozen(cell))
            write_json(self.path / "grid.json", {**known, "name": self.path.name, "command": command})
        finally:
            lock.release()

    def read(self) -> dict[str, Any]:
        """``grid.json``; empty while there is none."""
        try:
            found: dict[str, Any] = json.loads((self.path / "grid.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {"cells": {}}
        return found

    def note(self, cell: str, event: str, **more: Any) -> None:
        """Append an event."""
        append_json(self.path / "events.jsonl", {"time": time.time(), "cell": cell, "event": event, **more})

    def events(self) -> list[dict[str, Any]]:
        """All whole events."""
        return json_lines(self.path / "events.jsonl")

    def last_events(self) -> dict[str, dict[str, Any]]:
        """The last one of every cell."""
        return {str(event.get("cell")): event for event in self.events()}

    def state(self, cell: Cell, last: dict[str, Any]) -> State:
        """What has become of a cell: as its run says, and for what leaves no record there as its last event says."""
        state, code = cell.state(), last.get("code")
        if state is State.interrupted and code not in (None, 0, *STOPPED):
            return State.failed  # it left no result
        if state is State.new and code == 0 and cell.config.task in ONCE and last["time"] > cell.newest():
            return State.done
        return State.failed if state is State.new and code not in (None, 0, *STOPPED) else state


def name_of(swept: Iterable[str], fixed: Iterable[str]) -> str:
    """The default name of a grid: the keys that are swept, and a hash of all that is not.

    A grid that grows along its axes keeps its name.

    Example:
        >>> name_of(["optimizer.lr", "seed"], ["model=tiny"])[:8]
        'lr_seed_'
    """
    keys = sorted(swept)
    digest = hashlib.sha256(json.dumps([keys, sorted(fixed)]).encode()).hexdigest()[:8]
    return "_".join([*(key.rsplit(".", 1)[-1].rsplit("/", 1)[-1] for key in keys), digest])
