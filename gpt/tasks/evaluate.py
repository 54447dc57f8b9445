"""``task=evaluate``: measure a checkpoint on a split, a text, or passages with a last word to find."""

from __future__ import annotations

from gpt.runs import evaluation
from gpt.tasks.spec import Command, Driver, TaskSpec, launch_on_checkpoint


def check(command: Command) -> list[str]:
    """Return what the trained run and the text cannot do."""
    return evaluation.problems(command.trained)


def run(command: Command, driver: Driver) -> float | None:
    """Launch the ranks and show the records that they have added."""
    before = evaluation.read(command.run_dir)
    launch_on_checkpoint(command, driver)
    for name, record in evaluation.read(command.run_dir).items():
        if record != before.get(name):
            driver.console.table(name, list(evaluation.rows(record)))
    return None


TASK = TaskSpec(check, run, worker="gpt.tasks.workers.evaluate")
