"""Where a step's record goes: always ``metrics.jsonl``; W&B and TensorBoard when asked. One rank writes."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import sys
from pathlib import Path
from typing import Any, Protocol

from gpt.config import Wandb, WandbMode, plain, world_size
from gpt.runs import Job, git_revision, versions

Record = dict[str, Any]


def say(line: str) -> None:
    """A line for people, on the worker's own standard output: its log, and the terminal for rank 0."""
    print(line, flush=True)


class Sink(Protocol):
    """A place for records."""

    def write(self, record: Record) -> None:
        """Take one record; never raises, training does not die of logging."""

    def close(self, status: str, code: int) -> None:
        """Finish; ``status`` and ``code`` as in ``result.json`` and of the process."""


class Jsonl:
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

    def close(self, status: str, code: int) -> None:
        """Close the file."""
        os.close(self._descriptor)


class TensorBoard:
    """Scalars over steps in ``<run>/tensorboard``."""

    def __init__(self, run_dir: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def write(self, record: Record) -> None:
        """All numbers of the record."""
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, record["step"])

    def close(self, status: str, code: int) -> None:
        """Flush and close."""
        self._writer.close()


class WandbSink:
    """Weights & Biases, under one id for the whole life of the run, over tokens.

    ``mode=auto`` goes online if a key is configured and the server answers within ``init_timeout`` seconds, and
    offline otherwise; it never asks, and an error of W&B never reaches the training loop.
    """

    def __init__(self, job: Job) -> None:
        import wandb

        self._wandb = wandb
        settings = job.config.logger.wandb
        self._run = self._start(job, settings, wandb_mode(settings))
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")
        self._run.define_metric("val/loss", step_metric="tokens", summary="min")

    def _start(self, job: Job, settings: Wandb, mode: Any) -> Any:
        config = job.config
        arguments: dict[str, Any] = {
            "project": settings.project,
            "entity": settings.entity,
            "dir": str(job.run_dir),
            "id": run_id(job.run_dir),
            "resume": "allow" if mode == "online" else None,
            "name": job.run_dir.name,
            "group": settings.group,
            "job_type": config.task.value,
            "tags": [config.model.name, config.precision.dtype.value, f"{world_size(config)} ranks", *config.tags],
            "notes": config.notes or None,
            "config": {
                **plain(config),
                "command": " ".join(job.command),
                "versions": versions(),
                "git": git_revision(),
                "data_fingerprint": job.data.fingerprint,
            },
        }
        quiet = {"console": "off", "init_timeout": settings.init_timeout, "silent": True}
        try:
            return self._wandb.init(mode=mode, settings=self._wandb.Settings(**quiet), **arguments)
        except Exception as error:
            if mode != "online" or settings.mode is WandbMode.online:
                raise
            say(f"W&B is not reachable ({error}); going on offline: later, wandb sync {job.run_dir / 'wandb'}")
            return self._wandb.init(
                mode="offline", settings=self._wandb.Settings(**quiet), **{**arguments, "resume": None}
            )

    def write(self, record: Record) -> None:
        """One row; the step is explicit, so that a resumed run goes on where it was."""
        self._guarded(self._run.log, {k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def close(self, status: str, code: int) -> None:
        """Say how it ended."""
        self._run.summary["status"] = status
        self._guarded(self._run.finish, exit_code=code)

    @staticmethod
    def _guarded(call: Any, *args: Any, **kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except Exception as error:
            print(f"WARNING: W&B: {error}", file=sys.stderr)


def wandb_mode(settings: Wandb) -> Any:
    """How to reach W&B now."""
    if settings.mode is not WandbMode.auto:
        return settings.mode.value
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    return "online" if os.environ.get("WANDB_API_KEY") or _key_on_file() else "offline"


def _key_on_file() -> bool:
    import netrc

    try:
        path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
        return netrc.netrc(str(path)).authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def run_id(run_dir: Path) -> str:
    """The run's W&B id: made once, kept in the run directory."""
    path = run_dir / "wandb_id"
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()


def sinks(job: Job) -> tuple[Jsonl, list[Sink]]:
    """The record file, and all places for records including it."""
    jsonl = Jsonl(job.run_dir / "metrics.jsonl")
    everywhere: list[Sink] = [jsonl]
    if job.config.logger.wandb.enabled and job.config.logger.wandb.mode is not WandbMode.disabled:
        everywhere.append(WandbSink(job))
    if job.config.logger.tensorboard:
        everywhere.append(TensorBoard(job.run_dir))
    return jsonl, everywhere


def summarise(job: Job, step: int, name: str, figures: Record) -> None:
    """The numbers of an evaluation of the checkpoint of ``step``, as ``eval/<name>/...``; never raises."""
    short = re.sub(r"\S*/", "", name)
    numbers = {f"eval/{short}/{key}": value for key, value in figures.items() if isinstance(value, int | float)}
    if job.config.logger.tensorboard:
        board = TensorBoard(job.run_dir)
        board.write({"step": step, **numbers})
        board.close("done", 0)
    settings = job.config.logger.wandb
    if settings.enabled and settings.mode is not WandbMode.disabled:
        try:
            _wandb_summary(job, settings, {**numbers, f"eval/{short}/step": step})
        except Exception as error:
            print(f"WARNING: W&B: {error}", file=sys.stderr)


def _wandb_summary(job: Job, settings: Wandb, numbers: Record) -> None:
    """Into the run of the training where it can be opened again, which is online; else into a run of its own."""
    import wandb

    mode = wandb_mode(settings)
    where: dict[str, Any] = {"project": settings.project, "entity": settings.entity, "dir": str(job.run_dir)}
    quiet = wandb.Settings(console="off", init_timeout=settings.init_timeout, silent=True)
    run = None
    if mode == "online" and (job.run_dir / "wandb_id").exists():
        try:
            run = wandb.init(mode=mode, settings=quiet, id=run_id(job.run_dir), resume="must", **where)
        except Exception as error:
            say(f"W&B: the run of the training cannot be opened ({error}); the evaluation gets one of its own")
            mode = mode if settings.mode is WandbMode.online else "offline"
    if run is None:
        about = {**plain(job.config), "command": " ".join(job.command), "versions": versions(), "git": git_revision()}
        run = wandb.init(
            mode=mode,
            settings=quiet,
            name=f"{job.run_dir.name} evaluate",
            group=settings.group or job.run_dir.name,
            job_type=job.config.task.value,
            tags=[job.config.model.name, *job.config.tags],
            config=about,
            **where,
        )
    run.summary.update(numbers)
    run.finish()
