"""All runs of a grid, or of any folder: what was asked, what became of it, its curve. No Paddle, nothing is changed.

Runs may be of earlier versions, made on other machines, still going, or have ended before they left anything.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt.config.schema import Config, Data, Model, Parallel
from gpt.plan import flops
from gpt.runs import run_dir
from gpt.runs.grid import STOPPED, Folder
from gpt.utils.signals import GUARD

Array = NDArray[np.float64]
COLUMNS = ("step", "tokens", "train/loss", "val/loss", "seconds", "tokens_per_second", "mfu")
# What a state means, for people.
STATES = {
    "done": "it reached trainer.max_steps",
    "running": "somebody is at work on it",
    "stopped": "stopped by a signal; the same command goes on",
    "pruned": "given up by a search: others were better at the same step",
    "interrupted": "it ended without saying how, or before trainer.max_steps; the same command goes on",
    "guard": "stopped by the guard: the loss or the gradient was not finite, or a rank hung",
    "failed": "it ended with an error",
    "submitted": "given to a scheduler, and not begun or without a trace",
    "new": "not started",
    "lost": "its run folder is not here",
}
BAD = ("guard", "failed", "interrupted", "lost")
TAIL_BYTES, TAIL_LINES = 16384, 40


@dataclass(frozen=True)
class Run:
    """One run, or a cell of a grid that has left none.

    Attributes:
        name: of its folder, or of the cell.
        path: its folder, which need not be there.
        state: one of ``STATES``.
        config: dotted keys; ``gpt.runs.run_dir.NON_IDENTITY_KEYS`` are left out.
        named: the keys that its command named.
        command: in words.
        columns: figures per record, by the names of ``COLUMNS``; NaN where a record has none.
        result: of ``result.json``.
        code: with which its last start in the grid ended.
        logs: files, the most telling first.
        about: when and by what it was made.
        training: whether it is one; a cell of another task reads the folder of a run that is none of its own.
    """

    name: str
    path: Path
    state: str
    config: dict[str, Any]
    named: set[str]
    command: list[str]
    columns: dict[str, Array]
    result: dict[str, Any]
    code: int | None = None
    logs: list[Path] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    training: bool = True

    def last(self, column: str) -> float | None:
        """The last figure of a column; of ``val/loss`` and ``train/loss`` the result's where there is one."""
        if column in self.result:
            value = self.result[column]
            return float(value) if isinstance(value, int | float) else None
        finite = self.columns[column][np.isfinite(self.columns[column])]
        return float(finite[-1]) if len(finite) else None

    def model(self) -> Config | None:
        """As much of its configuration as counting takes; None if that is not known."""
        try:
            shape: dict[str, Any] = {key: int(self.config[f"model.{key}"]) for key in run_dir.SHAPE_KEYS}
            mp, seq_len = self.config.get("parallel.mp_degree", 1), self.config["data.seq_len"]
        except (KeyError, TypeError, ValueError):
            return None
        return Config(model=Model(**shape), parallel=Parallel(mp_degree=int(mp)), data=Data(seq_len=int(seq_len)))

    def parameters(self) -> int | None:
        """Of the model."""
        model = self.model()
        return flops.parameters(model) if model else None

    def flops_per_token(self) -> float | None:
        """Forward and backward, as ``gpt.plan`` counts them."""
        model = self.model()
        return flops.flops_per_token(model) if model else None


@dataclass(frozen=True)
class RunCollection:
    """What is in a folder: its runs, and the ``grid.json`` of each grid with its ``folder``."""

    runs: list[Run]
    grids: list[dict[str, Any]]


def find(folder: Path) -> RunCollection:
    """All runs of a grid's folder; of any other, those in it and below, and cells of grids below that left none.

    Args:
        folder: read only; may itself be a run.
    """
    below = sorted(_folders(folder))
    grids, runs, seen, cells = [], [], set(), set()
    for path in (path for path in below if (path / "grid.json").is_file()):
        grid = Folder(path)
        known = grid.read()
        grids.append({**known, "folder": path})
        last = grid.last_events()
        for name, cell in known["cells"].items():
            run = _cell(grid, name, cell, last.get(name, {}))
            if (name, run.path.resolve()) not in cells:  # two grids may have the same
                runs.append(run)
            cells.add((name, run.path.resolve()))
            seen |= {run.path.resolve()} if run.training else set()
    rest = (path for path in below if (path / "job.json").is_file() and path.resolve() not in seen)
    runs.extend(_run(path, path.name) for path in rest)
    count = Counter(run.name for run in runs)
    return RunCollection([_renamed(run, folder) if count[run.name] > 1 else run for run in runs], grids)


def has_runs(folder: Path) -> bool:
    """Whether ``find`` would find any, or a grid."""
    return next(_folders(folder), None) is not None


def _folders(folder: Path) -> Iterator[Path]:
    """Those with a run or a grid; nothing inside a run is looked at."""
    for where, inside, files in os.walk(folder):
        if "job.json" in files:
            inside.clear()
        inside[:] = [name for name in inside if not name.startswith(".")]
        if "job.json" in files or "grid.json" in files:
            yield Path(where)


def _renamed(run: Run, folder: Path) -> Run:
    return replace(run, name=os.path.relpath(run.path, folder))


def _cell(grid: Folder, name: str, cell: dict[str, Any], last: dict[str, Any]) -> Run:
    """A cell of a grid, with its last event: its run if that is there, else what the grid knows of it."""
    frozen = _json(grid.path / "cells" / f"{name}.json")
    path = Path(os.path.normpath(grid.path.resolve() / cell.get("run_dir", name)))
    if not path.exists() and Path(frozen.get("run_dir", "")).is_absolute():
        path = Path(frozen["run_dir"])  # the grid's folder was moved away from its runs
    code = last.get("code")
    log = [grid.log(name)] if grid.log(name).is_file() else []
    overrides = [str(override) for override in cell.get("overrides", [])]
    config = frozen.get("config") or {}
    training = config.get("task", "pretrain") == "pretrain"
    if training and (path / "job.json").is_file():
        run = _run(path, name, code, log, _keys(overrides))
        given_up = last.get("event") == "pruned" and run.state in ("stopped", "interrupted")
        return replace(run, state="pruned") if given_up else run
    ends = _ended(code) or ("lost" if training else "done") if code is not None else "interrupted"
    ends = "submitted" if last.get("event") == "submitted" else ends
    state = "running" if training and _at_work(path) else ends if last else "new"
    known = (
        _flat(config) if config and training else dict(_given(overrides, run_dir.NON_IDENTITY_KEYS if training else ()))
    )
    nothing = {column: np.zeros(0) for column in COLUMNS}
    command = ["python", "-m", "gpt.main", *overrides]
    return Run(name, path, state, known, _keys(overrides), command, nothing, {}, code, log, training=training)


def _run(path: Path, name: str, code: int | None = None, log: list[Path] | None = None, named: Any = None) -> Run:
    """What a run's folder says."""
    job, result = _json(path / "job.json"), run_dir.read_result(path) or {}
    command = [str(word) for word in job.get("command") or []]
    config = _flat(job.get("config") or {})
    columns = _columns(path / "metrics.jsonl")
    workers = sorted((path / "logs").glob("worker.*.log"), key=lambda file: int(re.sub(r"\D", "", file.name) or 0))
    about = {key: job[key] for key in ("created", "versions", "git", "machine") if job.get(key)}
    state = _state(path, result, config, code)
    return Run(
        name, path, state, config, (named or set()) | _keys(command), command, columns, result, code,
        [*(log or []), *workers], about,
    )  # fmt: skip


def _at_work(path: Path) -> bool:
    try:
        return run_dir.is_locked(path)
    except OSError:  # we may not lock it: it is somebody's archive
        return False


def _state(path: Path, result: dict[str, Any], config: dict[str, Any], code: int | None) -> str:
    if _at_work(path):
        return "running"
    if not result:
        return _ended(code) or "interrupted"
    if result.get("status") == "done" and result.get("step", 0) < (config.get("trainer.max_steps") or 0):
        return "interrupted"
    status = str(result.get("status"))
    return status if status in STATES else "failed"


def _ended(code: int | None) -> str | None:
    """What an exit code says; None: nothing."""
    if code in (None, 0):
        return None
    return "stopped" if code in STOPPED else "guard" if code == GUARD else "failed"


def _json(file: Path) -> dict[str, Any]:
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return contents if isinstance(contents, dict) else {}


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys, without those that do not change what is computed."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if name in run_dir.NON_IDENTITY_KEYS:
            continue
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _keys(words: list[str]) -> set[str]:
    """What a command names: the key of every ``key=value``."""
    return {word.lstrip("+~").split("=")[0] for word in words if "=" in word}


def _given(overrides: list[str], without: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """The keys and values of overrides, where nothing else is left of a command."""
    for override in overrides:
        key, _, text = override.lstrip("+").partition("=")
        if key in without or key.split(".")[0] in without:
            continue
        try:
            yield key, json.loads(text)
        except ValueError:
            yield key, text


def _columns(file: Path) -> dict[str, Array]:
    """The records by column. A grid may have a million: they are parsed in one go, line by line only if one is torn."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError:
        lines = []
    try:
        records = json.loads(b"[" + b",".join(lines) + b"]")
    except ValueError:
        records = run_dir.read_metrics(file.parent)
    records = [record for record in records if isinstance(record, dict) and isinstance(record.get("step"), int)]
    columns = {name: np.array([_number(r.get(name)) for r in records], dtype=np.float64) for name in COLUMNS}
    steps = columns["step"]
    if np.any(np.diff(steps) <= 0):  # computed again after a crash: what came later counts
        _, backwards = np.unique(steps[::-1], return_index=True)
        columns = {name: column[len(steps) - 1 - backwards] for name, column in columns.items()}
    return columns


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) else np.nan


def tail(log: Path) -> list[str]:
    """The last lines of a log, without the codes that colour a terminal."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    lines = [line.rsplit("\r", 1)[-1] for line in re.split(r"\r?\n", text)]
    clean = [re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", line).rstrip() for line in lines]
    return [line for line in clean if line][-TAIL_LINES:]
