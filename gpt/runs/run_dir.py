"""The run directory: its name, its record, what may go on in it, and its result. No Paddle here.

job.json                 the resolved job: configuration, data, command, versions, commit, machine
starts.jsonl, code.diff  every start, and what was edited since the commit: see gpt.runs.provenance
metrics.jsonl            one record per step
checkpoints/step_NNNNNNNN/
logs/worker.R.log
samples.jsonl            generated text
evaluation.json          the last evaluation of each kind
loss.png                 the curves
result.json              written last
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import OmegaConf

from gpt.config.derived import plain, typed
from gpt.config.rules import unknown_keys
from gpt.config.schema import TASK_SECTIONS, Config, Resume
from gpt.data.corpus import DatasetInfo
from gpt.runs.provenance import git_revision
from gpt.utils.errors import UserError
from gpt.utils.files import Lock, json_lines, write_json
from gpt.utils.machine import machine, versions

SHAPE_KEYS = ("vocab", "hidden", "layers", "heads", "ffn", "positions")
# Keys that change how a job is run or shown but not what it computes.
NON_IDENTITY_KEYS = (
    "task", *TASK_SECTIONS, "tags", "notes", "prompt", "yes", "dry_run", "grid", "optuna",
    "logger", "cluster", "device", "trainer.resume", "trainer.log_every", "data.cache_dir",
)  # fmt: skip


def run_name(config: dict[str, Any], parallel: str, schema: type = Config) -> str:
    """Return ``<model>_<parallel>_<hash8>``: a run is its configuration.

    Args:
        config: the resolved configuration as plain values.
        parallel: the name of the parallel preset.
        schema: the dataclass that ``config`` follows.
    """
    digest = hashlib.sha256(json.dumps(identity(config, schema), sort_keys=True).encode()).hexdigest()[:8]
    return f"{config['model']['name']}_{parallel}_{digest}"


def identity(values: dict[str, Any], schema: type = Config, prefix: str = "") -> dict[str, Any]:
    """Return the keys that make a run what it is, which its name hashes.

    These are all keys of the schema's first generation, and of the keys added ``since`` those that differ from the
    recorded default: a new key renames no run of before.
    """
    recorded, sections = _recorded(schema), _sections(schema)
    kept: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name in NON_IDENTITY_KEYS or (key in recorded and value == recorded[key]):
            continue
        if key not in sections:
            kept[key] = value
        elif isinstance(value, list):
            kept[key] = [identity(each, sections[key], f"{name}.") for each in value]
        elif section := identity(value, sections[key], f"{name}."):
            kept[key] = section
    return kept


def _recorded(schema: type) -> dict[str, Any]:
    """Return the recorded default of each later key of one section, as a plain value."""
    return {f.name: f.metadata["default"] for f in dataclasses.fields(schema) if "since" in f.metadata}


@functools.cache
def _sections(schema: type) -> dict[str, type]:
    """Return the dataclass of each key that holds one, or a list of them."""
    types = {key: (*get_args(hint), hint)[0] for key, hint in get_type_hints(schema).items()}
    return {key: each for key, each in types.items() if isinstance(each, type) and dataclasses.is_dataclass(each)}


def find_existing(name: str, folder: Path = Path("outputs")) -> str:
    """The name of the run in ``folder`` that is of the same configuration, which may have been typed in other words.

    ``parallel=auto``, a preset, and its degrees by hand are the same run; the preset in the name is for people.
    """
    model, digest = name.split("_", 1)[0], name.rsplit("_", 1)[1]
    names = [path.parent.name for path in folder.glob(f"{glob.escape(model)}_*_{digest}/job.json")]
    return names[0] if len(names) == 1 and name not in names else name


COMMAND = ["python", "-m", "gpt.main"]


def job_fields(config: Config, run_dir: Path, command: list[str]) -> dict[str, Any]:
    """Return what every frozen job has; a cell of a grid is a job without data."""
    return {"config": plain(config), "run_dir": str(run_dir), "command": command}


@dataclass(frozen=True)
class Job:
    """Everything a worker needs, as ``job.json`` holds it."""

    config: Config
    data: DatasetInfo
    run_dir: Path
    command: list[str]

    def write(self, file: Path | None = None) -> None:
        """Write ``job.json`` (or another ``file``) atomically."""
        write_json(
            file or self.run_dir / "job.json",
            {
                **job_fields(self.config, self.run_dir, self.command),
                "data": self.data.plain(),
                "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "versions": versions(),
                "machine": machine(),
                "git": git_revision(),
                "manifests": self.data.manifests(),
            },
        )

    @classmethod
    def read(cls, run_dir: Path, file: Path | None = None, now: Config | None = None) -> Job:
        """Read ``job.json`` (or another ``file``); the folder may have been moved since.

        Args:
            run_dir: of the run.
            file: of the job.
            now: of this command, for keys that the version that wrote the file did not have.

        Raises:
            UserError: there is none, or it is not one.
        """
        path = file or run_dir / "job.json"
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            data = DatasetInfo.from_plain(stored["data"])
            return cls(stored_config(stored["config"], now), data, run_dir, stored["command"])
        except FileNotFoundError:
            raise UserError(f"{run_dir}: no run here (no job.json); train first, or give hydra.run.dir=...") from None
        except Exception as error:
            raise UserError(f"{path}: not a job of this version ({type(error).__name__}: {error})") from error


def stored_config(stored: dict[str, Any], now: Config | None) -> Config:
    """Read a configuration that this or an earlier version wrote: keys that are gone are left out.

    New ones have their recorded default, which is what the earlier version did, or else ``now``'s value.

    Raises:
        omegaconf.errors.OmegaConfBaseException: a value is missing, or is not what it is today.
    """
    unknown_keys(stored)
    later = {key: _recorded(section) for key, section in _sections(Config).items()} | _recorded(Config)
    return typed(OmegaConf.merge(plain(now) if now else {}, later, stored))


def lock_of(run_dir: Path) -> Lock:
    """The run's lock, beside it so that the folder can be moved aside."""
    return Lock(run_dir.resolve().with_name(f".{run_dir.name}.lock"))


def is_locked(run_dir: Path) -> bool:
    """Whether a driver or its workers are at work there."""
    lock = lock_of(run_dir)
    if not lock.path.exists():
        return False
    free = lock.acquire()
    lock.release()
    return not free


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps that have a checkpoint folder, ascending; whether it is sound shows when it is read."""
    folders = (run_dir / "checkpoints").glob("step_*")
    return sorted(int(f.name[5:]) for f in folders if f.name[5:].isdigit())


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """``result.json``, or None while there is none."""
    try:
        result: dict[str, Any] = json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result


def config_diff(old: Config, new: Config) -> list[str]:
    """Keys that differ and matter to a run, as 'key old -> new'."""

    def flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if f"{prefix}{key}" in NON_IDENTITY_KEYS:
                continue
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    before, after = dict(flat(plain(old))), dict(flat(plain(new)))
    return [f"{k} {before.get(k)} -> {after.get(k)}" for k in after if before.get(k) != after.get(k)]


@dataclass(frozen=True)
class Decision:
    """What to do in a run directory: ``start`` or not, and what to tell the user first."""

    start: bool
    messages: list[str]
    aside: Path | None = None  # earlier work is moved there before the start


def resume_conflicts(run_dir: Path, config: Config) -> list[str]:
    """What keeps a training command out of ``run_dir``, as far as can be said without the data."""
    if config.trainer.resume is Resume.must and not checkpoint_steps(run_dir):
        return [f"trainer.resume=must, but there is no checkpoint in {run_dir}"]
    if config.trainer.resume is Resume.never or not (run_dir / "job.json").exists():
        return []
    try:
        stored = Job.read(run_dir, now=config).config
    except UserError as error:
        return [f"{error}; choose another hydra.run.dir=..."]
    was, now = dataclasses.asdict(stored.model), dataclasses.asdict(config.model)
    differing = [f"model.{k} is {was[k]} there and {now[k]} here" for k in SHAPE_KEYS if was[k] != now[k]]
    if stored.optimizer.name != config.optimizer.name:  # its state is of no use to another
        differing.append(f"optimizer.name is {stored.optimizer.name} there and {config.optimizer.name} here")
    return [_another(run_dir, "; ".join(differing))] if differing else []


def _another(run_dir: Path, why: str) -> str:
    return (
        f"{run_dir} holds another run: {why}: choose another hydra.run.dir=..., "
        "or trainer.resume=never to start afresh (the old run is kept beside it)"
    )


def resume_decision(run_dir: Path, config: Config, data: DatasetInfo) -> Decision:
    """Decide what a training command may do in ``run_dir``, after ``resume_conflicts``; nothing is touched.

    Raises:
        UserError: earlier work there is on other data.
    """
    if not (run_dir / "job.json").exists():
        return Decision(True, [])
    if config.trainer.resume is Resume.never:
        number = 1
        while (aside := run_dir.with_name(f"{run_dir.name}.old-{number}")).exists():
            number += 1
        return Decision(True, [f"starting afresh; the earlier run is now in {aside}"], aside)
    earlier = Job.read(run_dir, now=config)
    if earlier.data.tokenizer_digest != data.tokenizer_digest:
        raise UserError(_another(run_dir, "its tokenizer is another one (the text or its files changed)"))
    if earlier.data.fingerprint != data.fingerprint:
        raise UserError(_another(run_dir, "its data is not this data (the text or the token files changed)"))
    result = read_result(run_dir)
    if result and result.get("status") == "done" and result["step"] >= config.trainer.max_steps:
        figures = ", ".join(f"{k} {v:.4f}" for k, v in result.items() if k.endswith("/loss") and v is not None)
        remedy = f"go on with trainer.max_steps={2 * result['step']} hydra.run.dir={run_dir}, or start afresh"
        done = f"this run is done: step {result['step']:,}, {figures}; {remedy} with trainer.resume=never"
        return Decision(False, [done])
    messages = [f"changed since this run began: {change}" for change in config_diff(earlier.config, config)]
    return Decision(True, messages)


def truncate_metrics(run_dir: Path, step: int) -> None:
    """Drop records after ``step`` and a torn last line: those steps are computed again, to the same values."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return
    keep = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError):
                break
            keep += len(line)
    os.truncate(path, keep)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All whole records of ``metrics.jsonl``."""
    return json_lines(run_dir / "metrics.jsonl")
