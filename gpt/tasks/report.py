"""``task=report``: the page and the tables about runs."""

from __future__ import annotations

from gpt.runs.report import report
from gpt.tasks.spec import Command, Driver, TaskSpec


def run(command: Command, driver: Driver) -> float | None:
    """Write the page and the tables."""
    report.run(command.config, driver.console)
    return None


TASK = TaskSpec(lambda command: report.check(command.config), run)
