"""The process that the user starts: check the command, hand it to its task, launch the ranks. No Paddle here."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from gpt import tasks
from gpt.config import cluster_rules, derived, rules
from gpt.config.cluster import ClusterKind
from gpt.config.derived import world_size
from gpt.config.schema import Config, Ranks
from gpt.data import corpus, tokenizer_files
from gpt.plan import summary
from gpt.plan.explain import AutoParallelResult
from gpt.runs import source
from gpt.runs.run_dir import Job
from gpt.tasks.spec import Command
from gpt.utils import launch_env
from gpt.utils.console import Console
from gpt.utils.errors import UserError
from gpt.utils.files import Lock
from gpt.utils.launch_env import LaunchEnvironment
from launchers import checks, job, slurm


@dataclass
class Driver:
    """This process, as tasks see it: ``gpt.tasks.spec.Driver``."""

    console: Console
    role: LaunchEnvironment

    def launch(self, launched: Job, file: Path, lock: Lock | None) -> None:
        """Start the ranks of the job in ``file`` and wait for them."""
        job.launch(launched, file, self.console, lock)

    def locked(self, run_dir: Path) -> AbstractContextManager[Lock]:
        """Hold the run directory's lock."""
        return job.locked(run_dir, self.console)


def preflight(config: Config, run_dir: Path, data_problems: Callable[[Config], list[str]] = corpus.check) -> None:
    """Check all that can be known to be wrong before anything is created.

    Args:
        config: of the command.
        run_dir: of its run.
        data_problems: checks the data of a training; a grid looks once at what its cells share.

    Raises:
        UserError: listing every problem.
    """
    facts, away = config.task.facts, cluster_rules.is_away(config)
    if away and config.cluster.kind is not ClusterKind.slurm:
        return  # what is printed for other hosts is checked there: their files are not ours
    trained = source.job(config, run_dir) if facts.needs_checkpoint else None
    problems = []
    if facts.ranks is not Ranks.none:
        problems += (
            slurm.problems(config, launch_env.detect(os.environ), os.environ) if away else _machine_problems(config)
        )
    if facts.trains:
        problems += data_problems(config)
    problems += tasks.spec(config.task).check(Command(config, run_dir, [], trained))
    if problems:
        raise UserError.of(problems)


def _machine_problems(config: Config) -> list[str]:
    """Return what keeps the ranks from running on this host, or on those that were started with it."""
    role, ranks = launch_env.detect(os.environ), world_size(config)
    problems = role.problems(ranks, dict(summary.summary(config))["ranks"])
    return problems + checks.problems(config, role.here(ranks))


def run(config: Config, run_dir: Path, overrides: list[str], choice: AutoParallelResult | None = None) -> float | None:
    """Do the task; return the validation loss for a sweeper to minimise.

    Raises:
        UserError: bad input; nothing was started.
        JobFailed: with the exit code.
    """
    console, facts, task = Console(), config.task.facts, tasks.spec(config.task)
    for line in checks.warnings():
        console.warn(line)
    if facts.ranks is not Ranks.none:
        cluster = dataclasses.replace(config.cluster, device=derived.resolve_device(config))
        config = dataclasses.replace(config, cluster=cluster)
    role = LaunchEnvironment() if facts.ranks is Ranks.none else launch_env.detect(os.environ)
    trained = source.job(config, run_dir) if facts.needs_checkpoint else None
    command = Command(config, run_dir, overrides, trained, choice)
    return task.run(_on_named_data(command, console), Driver(console, role))


def _on_named_data(command: Command, console: Console) -> Command:
    """Put the data that the overrides name, if they name any, into the trained job.

    ``data.seq_len`` and ``data.vocab`` go with the model unless they are named themselves.

    Raises:
        UserError: the data does not suit this model.
    """
    trained, named = command.job, [override.lstrip("+").split("=")[0] for override in command.overrides]
    if trained is None or not any(key == "data" or key.startswith("data.") for key in named):
        return command
    kept = {"seq_len", "vocab"} - {key.removeprefix("data.") for key in named}
    data = dataclasses.replace(command.config.data, **{key: getattr(trained.config.data, key) for key in kept})
    trained = dataclasses.replace(trained, config=dataclasses.replace(trained.config, data=data))
    command = dataclasses.replace(command, job=trained)
    problems = rules.rule_problems(trained.config) + corpus.check(trained.config)
    if problems := problems + tasks.spec(command.config.task).check(command):
        raise UserError.of(problems)
    prepared = corpus.prepare(trained.config, console.note)
    vocabulary = source.vocabulary(trained)
    if vocabulary and prepared.tokenizer and not tokenizer_files.same(vocabulary, Path(prepared.tokenizer)):
        raise UserError(
            "this data is of another tokenizer than the model, whose loss on it means nothing: "
            "evaluate.kind=text evaluate.path=... tokenises a text as the model wants it"
        )
    return dataclasses.replace(command, job=dataclasses.replace(trained, data=prepared))
