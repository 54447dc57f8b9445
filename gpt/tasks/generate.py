"""``task=generate``: continue prompts with a checkpoint."""

from __future__ import annotations

import dataclasses
import sys

from gpt.config.schema import Config
from gpt.inference import prompts
from gpt.runs import source
from gpt.tasks.spec import Command, Driver, TaskSpec, launch_on_checkpoint

# Milliseconds that OpenMP's threads stay awake for more work. While a token is decoded they would take the cores from
# numpy's own: 1.6 times the speed. A training step has work for them all the time.
DECODING = {"KMP_BLOCKTIME": "1"}


def check(command: Command) -> list[str]:
    """Return what is wrong with the prompts."""
    return prompts.check(command.trained.config, source.vocabulary(command.trained))


def terminal(config: Config) -> bool:
    """Return whether rank 0 shows text as it comes, in a session or in a terminal."""
    return config.generate.interactive or (config.generate.stream and sys.stdout.isatty())


def run(command: Command, driver: Driver) -> float | None:
    """Launch the ranks on prompts that they can read."""
    job, logs = command.trained, command.run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    job = dataclasses.replace(job, config=prompts.hand_over(job.config, logs))
    return launch_on_checkpoint(dataclasses.replace(command, job=job), driver)


TASK = TaskSpec(check, run, worker="gpt.tasks.workers.generate", environment=DECODING, terminal=terminal)
