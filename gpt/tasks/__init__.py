"""One module per task, named like its member of ``Task``, which it declares as ``TASK``. Paddle is not imported."""

from __future__ import annotations

import importlib

from gpt.config.schema import Task
from gpt.runs.run_dir import Job
from gpt.tasks.spec import TaskSpec
from gpt.utils.signals import Signals


def spec(task: Task) -> TaskSpec:
    """Return what the task's module declares."""
    declared: TaskSpec = importlib.import_module(f"gpt.tasks.{task.value}").TASK
    return declared


def run(job: Job, signals: Signals) -> int:
    """Do the job's task on this rank; return the exit code."""
    code: int = importlib.import_module(spec(job.config.task).worker).run(job, signals)
    return code
