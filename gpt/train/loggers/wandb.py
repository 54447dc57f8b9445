"""Records to Weights & Biases. One run, one curve: however often a training is interrupted, every step is there once.

``metrics.jsonl`` is the truth: a start cuts it back to the checkpoint that it goes on from. Then W&B gets all of it
that it does not have.

- Online the server says how far it is. Steps that it has, which are computed again to the same values, are left out,
  and those that it lacks are sent.
- Offline nothing can be appended to: each start makes a new folder, and ``wandb sync`` puts a folder's rows in place of
  what the server has of that id, from the first row on. So the folder begins with all earlier steps, and the folders of
  earlier starts go, synced or not: one folder, one curve, for ``wandb leet`` and for ``wandb sync``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt.config.schema import Wandb, WandbMode
from gpt.runs import wandb_run
from gpt.runs.checkpoint.checkpoint import folder_of
from gpt.runs.run_dir import Job, checkpoint_steps, read_metrics
from gpt.train.loggers.base import Logger, LoggerSpec, Record
from gpt.utils import heartbeat
from gpt.utils.console import say

SHOWN_SAMPLES = 100  # the newest of samples.jsonl
BEAT_EVERY = 1000  # records that are repeated; half a second


class WandbLogger(Logger):
    """Weights & Biases, under one id for the whole life of the run, over tokens.

    ``mode=auto`` goes online if a key is configured and the server answers within ``init_timeout`` seconds, and
    offline otherwise; it never asks, and an error of W&B never reaches the training loop.
    """

    def __init__(self, job: Job) -> None:
        self._job, self._settings = job, job.config.logger.wandb
        self._id = wandb_run.run_id(job.run_dir)
        earlier = wandb_run.segments(job.run_dir, self._id)
        self._wandb = imported(job.run_dir)
        self._run = self._start(wandb_run.mode_now(self._settings))
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")
        self._run.define_metric("val/loss", step_metric="tokens", summary="min,last")
        self._has = 0  # the last step that the server has
        _guarded(self._catch_up, earlier)
        if self._settings.links:
            _guarded(wandb_run.link, Path(self._settings.links), job.run_dir, self._id)

    def _start(self, mode: str) -> Any:
        arguments = {**where(self._job), **wandb_run.about(self._job), "id": self._id}
        settings = self._wandb.Settings(**quiet(self._settings))
        try:
            resume = "allow" if mode == "online" else None
            return self._wandb.init(mode=mode, settings=settings, resume=resume, **arguments)
        except Exception as error:
            if mode != "online" or self._settings.mode is WandbMode.online:
                raise
            say(f"W&B is not reachable ({error}); going on offline: later, wandb sync {self._job.run_dir / 'wandb'}")
            settings = self._wandb.Settings(**quiet(self._settings))
            return self._wandb.init(mode="offline", settings=settings, resume=None, **arguments)

    def _catch_up(self, earlier: list[Path]) -> None:
        """Log what the run has recorded and W&B lacks; if that is all of it, earlier folders go."""
        if self._run.resumed:
            self._has = self._run.step - 1  # the server says what comes next
        for number, record in enumerate(read_metrics(self._job.run_dir)):
            if number % BEAT_EVERY == 0:
                heartbeat.beat(record["step"], "tell W&B what was before")
            self._log(record)
        for step in checkpoint_steps(self._job.run_dir):
            if step > self._has:
                self._refer(step)
        if self._has <= 0:
            wandb_run.remove(earlier)

    def _log(self, record: Record) -> None:
        if record["step"] > self._has:
            self._run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def _refer(self, step: int) -> None:
        artifact = self._wandb.Artifact(f"checkpoint-{self._id}", type="model", metadata={"step": step})
        folder = folder_of(self._job.run_dir, step).resolve()
        artifact.add_reference(folder.as_uri(), name=folder.name, checksum=False)  # a link: nothing is read or copied
        self._run.log_artifact(artifact, aliases=["latest", folder.name])

    def write(self, record: Record) -> None:
        """One row; the step is explicit, so that a resumed run goes on where it was."""
        _guarded(self._log, record)

    def saved(self, step: int) -> None:
        """A reference to the checkpoint's folder as an artifact, with ``logger.wandb.checkpoints``."""
        if self._settings.checkpoints and step > self._has:
            _guarded(self._refer, step)

    def sampled(self, step: int) -> None:
        """The newest generated texts as a table, and the last one in the summary, where terminals show it."""
        _guarded(self._show_samples, step)

    def _show_samples(self, step: int) -> None:
        lines = (self._job.run_dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()[-SHOWN_SAMPLES:]
        rows = [[row[key] for key in ("step", "prompt", "text")] for row in map(json.loads, lines)]
        table = self._wandb.Table(columns=["step", "prompt", "text"], data=rows)
        self._run.log({"samples": table}, step=max(step, self._has + 1))
        self._run.summary["sample"] = f"{rows[-1][1]}{rows[-1][2]}"

    def close(self, status: str, code: int, why: str = "") -> None:
        """Say how it ended; an end that needs a person is an alert."""
        if why:
            _guarded(self._run.alert, title=f"{status}: {self._job.run_dir.name}", text=why, level="ERROR")
        _guarded(self._run.summary.update, {"status": status})
        _guarded(self._run.finish, exit_code=code)


def imported(run_dir: Path) -> Any:
    """W&B, which is told to keep what it stages and logs with the run instead of in the user's home."""
    for key, folder in (("WANDB_DATA_DIR", "data"), ("WANDB_CACHE_DIR", "cache")):
        os.environ.setdefault(key, str(run_dir / "wandb" / folder))
    import wandb

    return wandb


def where(job: Job) -> dict[str, Any]:
    """Project, and the folder."""
    settings = job.config.logger.wandb
    return {"project": settings.project, "entity": settings.entity, "dir": str(job.run_dir)}


def quiet(settings: Wandb) -> dict[str, Any]:
    """Nothing on the terminal, no capture of it, and no long wait."""
    return {"console": "off", "init_timeout": settings.init_timeout, "silent": True}


def _guarded(call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    try:
        call(*args, **kwargs)
    except Exception as error:
        print(f"WARNING: W&B: {error}", file=sys.stderr)


def summarise(job: Job, step: int, numbers: Record) -> None:
    """Into the run of the training where it can be opened again, which is online; else into a run of its own."""
    settings = job.config.logger.wandb
    wandb, mode, run = imported(job.run_dir), wandb_run.mode_now(settings), None
    if mode == "online" and (job.run_dir / "wandb_id").exists():
        try:
            opened = {"id": wandb_run.run_id(job.run_dir), "resume": "must", **where(job)}
            run = wandb.init(mode=mode, settings=wandb.Settings(**quiet(settings)), **opened)
        except Exception as error:
            say(f"W&B: the run of the training cannot be opened ({error}); the evaluation gets one of its own")
            mode = mode if settings.mode is WandbMode.online else "offline"
    if run is None:
        labels = wandb_run.about(job)
        labels |= {"name": f"{labels['name']} evaluate", "group": labels["group"] or job.run_dir.name}
        run = wandb.init(mode=mode, settings=wandb.Settings(**quiet(settings)), **where(job), **labels)
    run.summary.update(numbers)
    run.finish()


LOGGER = LoggerSpec("W&B", enabled=wandb_run.is_enabled, make=WandbLogger, summarise=summarise)
