"""A cell of a grid: a command, resolved and frozen, and what has become of its run. No Paddle here."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from gpt.config.derived import plain, world_size
from gpt.config.schema import Config, Resume
from gpt.runs import run_dir
from gpt.utils.errors import UserError
from gpt.utils.files import Lock, append_json, json_lines, write_atomic, write_json

LAST_BYTES = 8192  # hold a record


class State(Enum):
    """What has become of a cell's run, as its folder says."""

    new = "new"
    done = "done"
    interrupted = "interrupted"  # it goes on from its checkpoint
    failed = "failed"
    running = "running"  # somebody holds its lock


@dataclass(frozen=True)
class Cell:
    """One command of a grid.

    Attributes:
        overrides: of the whole command.
        config: typed and checked.
        run_dir: a cell is the same run as the single command: its name is a hash of the resolved configuration.
        differs: the overrides that are not the same in all cells, for people.
    """

    overrides: list[str]
    config: Config
    run_dir: Path
    differs: list[str] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        """What tells it from all others: its run, and for what is not training also the rest of its configuration,
        wherever it is computed."""
        if self.trains:
            return self.run_dir.name
        kept = {key: value for key, value in plain(self.config).items() if key not in ("cluster", "dry_run", "grid")}
        text = json.dumps(kept, sort_keys=True)
        return f"{self.run_dir.name}_{self.config.task.value}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def label(self) -> str:
        """What tells it from the other cells, for people."""
        return label(self.differs)

    @property
    def ranks(self) -> int:
        """Slots that it needs."""
        return world_size(self.config)

    @property
    def trains(self) -> bool:
        """Whether it is a training."""
        return self.config.task.facts.trains

    def state(self) -> State:
        """What has become of it, as its run's folder says."""
        return State.running if run_dir.is_locked(self.run_dir) else self.last_state()

    def last_state(self) -> State:
        """The same for who holds the run's lock. What is not training leaves no record there: it is new."""
        if not self.trains or self.config.trainer.resume is Resume.never:
            return State.new
        result = run_dir.read_result(self.run_dir)
        if result is None:
            return State.interrupted if (self.run_dir / "job.json").exists() else State.new
        status, short = result.get("status"), result.get("step", 0) < self.config.trainer.max_steps
        if status == "done":
            return State.interrupted if short else State.done
        return State.interrupted if status == "stopped" else State.failed

    def newest(self) -> float:
        """When its run got its newest checkpoint, in seconds since 1970."""
        try:
            return (self.run_dir / "checkpoints").stat().st_mtime
        except OSError:
            return 0.0

    def record(self) -> dict[str, Any]:
        """The newest record of its run; empty if there is none, or none is needed."""
        if not self.trains:
            return {}
        try:
            with open(self.run_dir / "metrics.jsonl", "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
                for line in reversed(file.read().split(b"\n")[:-1]):
                    with contextlib.suppress(ValueError):
                        record: dict[str, Any] = json.loads(line)
                        return record
        except OSError:
            pass
        return {}

    def value(self) -> float | None:
        """What a sweeper minimises: the newest validation loss of its run, if it trains."""
        if not self.trains:
            return None
        result = run_dir.read_result(self.run_dir) or {}
        loss = result.get("val/loss")
        if loss is None:
            losses = [record["val/loss"] for record in run_dir.read_metrics(self.run_dir) if "val/loss" in record]
            loss = losses[-1] if losses else None
        return float(loss) if loss is not None else None

    def save(self, file: Path) -> None:
        """Write the cell as a job without data: what is edited in ``conf/`` later does not change it."""
        fields = run_dir.job_fields(self.config, self.run_dir.resolve(), [*run_dir.COMMAND, *self.overrides])
        write_atomic(file, json.dumps({**fields, "differs": self.differs}, indent=2), durable=False)

    @classmethod
    def load(cls, file: Path) -> Cell:
        """Read what ``save`` of this or an earlier version wrote.

        Raises:
            UserError: it is not such a file.
        """
        try:
            stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            config = run_dir.stored_config(stored["config"], None)
            overrides = stored["overrides"] if "overrides" in stored else stored["command"][len(run_dir.COMMAND) :]
            return cls(overrides, config, Path(stored["run_dir"]), stored["differs"])
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise UserError(f"{file}: not a frozen command of this version ({why}); type it again") from error


def label(overrides: Sequence[str]) -> str:
    """Overrides as they are shown: the last part of each key is enough, unless two would look the same.

    Example:
        >>> label(["optimizer.lr=0.001", "seed=1"]), label(["model.hidden=8", "x.hidden=9"])
        ('lr=0.001 seed=1', 'model.hidden=8 x.hidden=9')
    """
    pairs = [override.lstrip("+").partition("=") for override in overrides]
    short = [key.rsplit(".", 1)[-1] for key, _, _ in pairs]
    names = short if len(set(short)) == len(short) else [key for key, _, _ in pairs]
    return " ".join(f"{name}{equals}{value}" for name, (_, equals, value) in zip(names, pairs, strict=True)) or "(one)"


# A grid's own folder: which cells it has, what happened to them, their output. Several drivers may write to it.

STOPPED = (130, 143, -2, -15)  # exit codes of what was asked to end


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
                cell.save(self.frozen(cell))
            write_json(self.path / "grid.json", {**known, "name": self.path.name, "command": command})
        finally:
            lock.release()

    def read(self) -> dict[str, Any]:
        """``grid.json``; empty while there is none."""
        try:
            contents: dict[str, Any] = json.loads((self.path / "grid.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {"cells": {}}
        return contents

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
        once = cell.config.task.facts.once_per_checkpoint
        if state is State.new and code == 0 and once and last["time"] > cell.newest():
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
