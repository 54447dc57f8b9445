"""``task=import_weights``: other projects' weights to a checkpoint."""

from __future__ import annotations

import shlex

from gpt.runs.convert import import_weights
from gpt.tasks.spec import Command, Driver, TaskSpec


def run(command: Command, driver: Driver) -> float | None:
    """Write the checkpoint and show what it holds."""
    driver.console.table("imported", import_weights.run(command.config, driver.console.warn))
    checkpoint = f"checkpoint={shlex.quote(str(command.config.import_weights.output))}"
    driver.console.next_commands([(f"python -m gpt.main task=generate {checkpoint}", "continue a prompt")])
    return None


TASK = TaskSpec(lambda command: import_weights.check(command.config), run)
