"""A run keeps its name from version to version: with another one, the same command would start afresh beside it."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from conftest import ROOT, composed, configured

from gpt import cli
from gpt.config.derived import plain
from gpt.config.schema import Config, Optimizer
from gpt.runs import run_dir

NAMES: dict[str, str] = json.loads((ROOT / "tests" / "run_names.json").read_text())


def test_commands_keep_the_run_names_of_the_version_before(tmp_path: Path) -> None:
    """The file was written by that version; names are added to it, never changed."""
    for command, name in NAMES.items():
        overrides = shlex.split(command)
        assert cli.name_of_run(*composed(overrides), overrides, tmp_path) == name, command


@dataclass(frozen=True)
class LaterOptimizer(Optimizer):
    name: str = field(default="adamw", metadata={"since": 3, "default": "adamw"})


@dataclass(frozen=True)
class Extra:
    size: int = field(default=1, metadata={"since": 3, "default": 1})


@dataclass(frozen=True)
class Later(Config):
    optimizer: LaterOptimizer = field(default_factory=LaterOptimizer)
    extra: Extra = field(default_factory=Extra)


def test_a_new_key_names_a_run_only_where_it_differs_from_its_recorded_default() -> None:
    now = plain(configured([]))

    def later(name: str, size: int) -> str:
        values = now | {"optimizer": now["optimizer"] | {"name": name}, "extra": {"size": size}}
        return run_dir.run_name(values, "single", Later)

    assert later("adamw", 1) == "tiny_single_faf5290b"
    assert len({later("adamw", 1), later("lion", 1), later("adamw", 2), later("lion", 2)}) == 4


def test_a_run_of_before_a_key_was_added_is_read_with_the_recorded_default() -> None:
    stored = plain(configured([]))
    del stored["parallel"]["engine"]
    assert run_dir.stored_config(stored, configured(["parallel=auto_dp2"])).parallel == configured([]).parallel
