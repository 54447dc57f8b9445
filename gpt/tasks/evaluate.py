"""``task=evaluate``: measure a checkpoint on a split, a text, or passages with a last word to find."""

from __future__ import annotations

from gpt.runs import evaluation
from gpt.runs.run_dir import Job
from gpt.tasks.spec import Command, Driver, TaskSpec, launch_on_checkpoint
from gpt.utils.console import Console


def check(command: Command) -> list[str]:
    """Return what the trained run and the text cannot do."""
    return evaluation.problems(command.trained)


def run(command: Command, driver: Driver) -> float | None:
    """Launch the ranks and show their record."""
    launch_on_checkpoint(command, driver)
    return conclude(command.trained, driver.console)


def conclude(job: Job, console: Console) -> float | None:
    """Show the newest record."""
    name, record = list(evaluation.read(job.run_dir).items())[-1]
    console.table(name, list(evaluation.rows(record)))
    return None


TASK = TaskSpec(check, run, conclude=conclude, worker="gpt.tasks.workers.evaluate")
