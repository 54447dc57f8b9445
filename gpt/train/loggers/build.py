"""The loggers of a job."""

from __future__ import annotations

import re
import sys

from gpt.runs import wandb_run
from gpt.runs.run_dir import Job
from gpt.train.loggers.base import Jsonl, Logger, Record, TensorBoard


def loggers(job: Job) -> tuple[Jsonl, list[Logger]]:
    """The record file, and all places for records including it."""
    jsonl = Jsonl(job.run_dir / "metrics.jsonl")
    everywhere: list[Logger] = [jsonl]
    if wandb_run.is_enabled(job.config):
        from gpt.train.loggers.wandb import WandbSink

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
    if wandb_run.is_enabled(job.config):
        from gpt.train.loggers import wandb

        try:
            wandb.summarise(job, {**numbers, f"eval/{short}/step": step})
        except Exception as error:
            print(f"WARNING: W&B: {error}", file=sys.stderr)
