"""The registry of loggers, and the loggers of a job."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys

from gpt.config.schema import Config
from gpt.runs.run_dir import Job
from gpt.train import loggers as package
from gpt.train.loggers.base import Jsonl, Logger, LoggerSpec, Record


def enabled(config: Config) -> list[LoggerSpec]:
    """Return the loggers that a configuration asks for: every module of this package that declares ``LOGGER``."""
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    specs: list[LoggerSpec] = [module.LOGGER for module in modules if hasattr(module, "LOGGER")]
    return [spec for spec in specs if spec.enabled(config)]


def problems(config: Config) -> list[str]:
    """Return what keeps the loggers of a configuration from being used on this machine."""
    return [problem for spec in enabled(config) for problem in spec.problems()]


def loggers(job: Job) -> tuple[Jsonl, list[Logger]]:
    """Open the loggers of a job; the first, which writes ``metrics.jsonl``, is returned by itself too."""
    jsonl = Jsonl(job.run_dir / "metrics.jsonl")
    return jsonl, [jsonl, *(spec.make(job) for spec in enabled(job.config))]


def summarise(job: Job, step: int, name: str, figures: Record) -> None:
    """Log the figures of an evaluation of the checkpoint of ``step``, as ``eval/<name>/...``; never raise."""
    short = re.sub(r"\S*/", "", name)
    numbers = {f"eval/{short}/{key}": value for key, value in figures.items() if isinstance(value, int | float)}
    for spec in enabled(job.config):
        try:
            spec.summarise(job, step, {**numbers, f"eval/{short}/step": step})
        except Exception as error:
            print(f"WARNING: {spec.name}: {error}", file=sys.stderr)
