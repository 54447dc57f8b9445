"""A checked job becomes workers: one job per run directory, shown while it runs, its failure in a sentence."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt import tasks
from gpt.config.cluster import Device
from gpt.config.derived import world_size
from gpt.runs.run_dir import Job, lock_of
from gpt.utils import heartbeat
from gpt.utils.console import Console
from gpt.utils.errors import JobFailed, UserError
from gpt.utils.files import Lock
from gpt.utils.launch_env import WorkerEnv
from gpt.utils.signals import BAD_INPUT, FAILED, GUARD
from launchers import local, rank_env, rendezvous
from launchers.outcome import Outcome
from launchers.rank_env import RankEnv
from launchers.watchdog import Watchdog

PATIENCE_SECONDS = 20.0  # for the workers of a killed driver, which save before they end


@contextmanager
def locked(run_dir: Path, console: Console) -> Iterator[Lock]:
    """One job per run directory. The lock is beside it, so that the directory can be moved aside.

    A grid has locked it before it started us, and handed the lock over.
    """
    lock = lock_of(run_dir)
    inherited = WorkerEnv.from_env(os.environ).run_lock
    if inherited is not None:
        lock.descriptor = inherited
    elif not lock.acquire():
        console.note(f"{run_dir} is in use; waiting up to {PATIENCE_SECONDS:.0f} s for its workers to end")
        if not lock.acquire(PATIENCE_SECONDS):
            raise UserError(f"{run_dir} is in use by another process; wait, stop it, or choose another hydra.run.dir")
    try:
        yield lock
    finally:
        lock.release()


def launch(job: Job, file: Path, console: Console, lock: Lock | None) -> None:
    """Run the workers; their lines and records appear as they come.

    Raises:
        JobFailed: a worker ended with anything but 0.
    """
    config, logs, ranks = job.config, job.run_dir / "logs", world_size(job.config)
    terminal = tasks.spec(config.task).terminal(config)
    training, gpu = config.task.facts.trains, config.cluster.device is Device.gpu
    records = local.Tail(job.run_dir / "metrics.jsonl")
    # One rank has nobody to wait for.
    watchdog = Watchdog(logs, ranks, config.cluster.hang_seconds if ranks > 1 else 0, records.path)
    heartbeat.clear(logs)
    hub = rendezvous.hub()
    hub.announce(job.run_dir, file, hub.role.share(ranks))
    with console.progress(config.trainer.max_steps if training else None) as progress:

        def poll() -> Outcome | None:
            progress.records(records.lines())
            stuck = watchdog.stuck()
            return Outcome(GUARD, reason=stuck) if stuck else None

        def choose() -> list[RankEnv]:
            if hub.role.starter:
                return rank_env.places(hub.role, os.environ, ranks, gpu=gpu)
            return rank_env.here(ranks, gpu=gpu)

        outcome = local.run_workers(
            ["-m", "gpt.worker", str(job.run_dir), str(file)],
            choose,
            logs,
            local.environment(config, hub.role.here(ranks), WorkerEnv(live=progress.live, terminal=terminal)),
            show=progress.line,
            poll=poll,
            others=hub.remotes,
            hand_over=WorkerEnv.from_env(os.environ).slot_locks + ((lock.descriptor,) if lock else ()),
            terminal=terminal,
            retry=not hub.role.starter,
        )
        poll()
    if outcome.code:
        raise _failure(outcome, logs / f"worker.{outcome.rank}.log", watchdog)


def _failure(outcome: Outcome, log: Path, watchdog: Watchdog) -> JobFailed:
    """What the user is told; the lines of rank 0 are on the terminal already, those of another rank are not."""
    if outcome.reason:
        return JobFailed(outcome.reason, outcome.code)
    if outcome.waited and not outcome.signal:  # Paddle's Gloo gives up after 30 s, long before the watchdog
        message = f"STOPPED: worker {outcome.rank} waited for the others in vain. {watchdog.missing()}"
        return JobFailed(f"{message}; the logs: {log.parent}/worker.R.log", GUARD)
    stopped = outcome.signal and outcome.code == 128 + outcome.signal
    if stopped or (outcome.code == BAD_INPUT and outcome.rank == 0):  # what it had to say is said
        return JobFailed("", outcome.code)
    if outcome.signal and outcome.code < 0:
        return JobFailed(f"ended by {outcome.signal.name} before it could save", 128 + outcome.signal)
    if outcome.code < 0:
        name = signal.Signals(-outcome.code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        message = f"worker {outcome.rank} was ended by {name}{hint}; the same command goes on from the last checkpoint"
        return JobFailed(f"{message}{outcome.shown}", FAILED)
    message = f"worker {outcome.rank} ended with exit code {outcome.code}; its log: {log}"
    return JobFailed(f"{message}{outcome.shown if outcome.rank else ''}", outcome.code)
