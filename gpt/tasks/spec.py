"""What a task declares, and the driver's side of tasks that work on a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from gpt.config.schema import Config
from gpt.plan.explain import AutoParallelResult
from gpt.runs.run_dir import COMMAND, Job
from gpt.utils.console import Console
from gpt.utils.files import Lock
from gpt.utils.launch_env import LaunchEnvironment


@dataclass(frozen=True)
class Command:
    """A command without problems of its own.

    Attributes:
        config: of the command.
        run_dir: of its run.
        overrides: as typed.
        job: the trained job with this command's sections, for a task that needs a checkpoint.
        choice: what ``parallel=auto`` chose.
    """

    config: Config
    run_dir: Path
    overrides: list[str]
    job: Job | None = None
    choice: AutoParallelResult | None = None

    @property
    def words(self) -> list[str]:
        """The command line, for the record."""
        return [*COMMAND, *self.overrides]

    @property
    def trained(self) -> Job:
        """``job`` of a task that needs a checkpoint."""
        assert self.job is not None, "gpt.config.schema.TASKS"
        return self.job


class Driver(Protocol):
    """The process that runs a command, as its task sees it."""

    console: Console
    role: LaunchEnvironment

    def launch(self, job: Job, file: Path, lock: Lock | None) -> None:
        """Start the ranks of the job in ``file`` and wait for them.

        Raises:
            JobFailed: a rank ended with anything but 0.
        """

    def locked(self, run_dir: Path) -> AbstractContextManager[Lock]:
        """Hold the run directory's lock."""


def no_problems(command: Command) -> list[str]:
    """Return nothing: the rules have seen all that can be wrong."""
    return []


def no_terminal(config: Config) -> bool:
    """Return False: ranks print to the driver, which shows whole lines."""
    return False


def no_results(job: Job, console: Console) -> float | None:
    """Show nothing: the ranks have shown their results."""
    return None


def launch_on_checkpoint(command: Command, driver: Driver) -> float | None:
    """Run the task's ranks on the trained job; there is no validation loss to return."""
    job = command.trained
    (command.run_dir / "logs").mkdir(parents=True, exist_ok=True)
    file = command.run_dir / "logs" / f"{command.config.task.value}.json"
    dataclasses.replace(job, command=command.words).write(file)
    driver.launch(job, file, None)
    return None


@dataclass(frozen=True)
class TaskSpec:
    """A task; the facts that rules need of it are in ``gpt.config.schema.TASKS``.

    Attributes:
        check: returns problems that depend on this machine or on files, before anything is created.
        run: the driver's side; returns the validation loss for a sweeper to minimise, if the task has one.
        conclude: shows the results of a job that has ended well, at the end of ``run``, or on rank 0 if an external
            launcher has started it.
        worker: name of the module whose ``run(job, signals)`` each rank calls; only ranks import it.
        environment: variables of the ranks.
        terminal: whether rank 0 inherits the terminal, to show text as it comes or to read what is typed.
    """

    check: Callable[[Command], list[str]] = no_problems
    run: Callable[[Command, Driver], float | None] = launch_on_checkpoint
    conclude: Callable[[Job, Console], float | None] = no_results
    worker: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    terminal: Callable[[Config], bool] = no_terminal
