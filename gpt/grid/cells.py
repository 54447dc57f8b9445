"""A cell of a grid: a command, resolved and frozen, and what has become of its run. No Paddle here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from gpt import runs
from gpt.config import Config, Task, UserError, plain, world_size
from gpt.files import write_json


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
        """What tells it from all others: its run, and for what is not training also the rest of its configuration."""
        if self.config.task is Task.pretrain:
            return self.run_dir.name
        text = json.dumps(plain(self.config), sort_keys=True)
        return f"{self.run_dir.name}_{self.config.task.value}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def ranks(self) -> int:
        """Slots that it needs."""
        return world_size(self.config)

    def state(self) -> State:
        """What has become of it. A task on a trained run is always new: it leaves no record of its own."""
        if self.config.task is not Task.pretrain:
            return State.new
        if runs.held(self.run_dir):
            return State.running
        result = runs.read_result(self.run_dir)
        if result is None:
            return State.interrupted if (self.run_dir / "job.json").exists() else State.new
        status, short = result.get("status"), result.get("step", 0) < self.config.trainer.max_steps
        if status == "done":
            return State.interrupted if short else State.done
        return State.interrupted if status == "stopped" else State.failed

    def freeze(self, file: Path) -> None:
        """Write the command as it is now: what is edited in ``conf/`` later does not change it."""
        frozen = {"overrides": self.overrides, "run_dir": str(self.run_dir.resolve()), "config": plain(self.config)}
        write_json(file, {**frozen, "differs": self.differs})

    @classmethod
    def thaw(cls, file: Path) -> Cell:
        """Read what ``freeze`` wrote.

        Raises:
            UserError: it is not such a file.
        """
        try:
            frozen: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            config = runs.stored_config(frozen["config"], None)
            return cls(frozen["overrides"], config, Path(frozen["run_dir"]), frozen["differs"])
        except Exception as error:
            raise UserError(f"{file}: not a frozen command ({type(error).__name__}: {error})") from error
