"""Launch the workers of a checked job: one job per run directory, shown while it runs, its failure in a sentence."""

from __future__ import annotations

import os
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
from gpt.utils.outcome import Outcome
from gpt.utils.signals import GUARD
from gpt.utils.watchdog import Watchdog
from launchers import external, local, rank_env
from launchers.rank_env import RankEnv

PATIENCE_SECONDS = 20.0  # for the workers of a killed driver, which save before they end


@contextmanager
def locked(run_dir: Path, console: Console) -> Iterator[Lock]:
    """Lock the run directory: one job at a time. The lock is beside it, so that the directory can be moved aside.

    A process that a grid started inherits the grid's lock.
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
    """Run the workers and show their lines and records as they come.

    Where an external launcher has started this process for one rank, it becomes the worker and does not return.

    Raises:
        JobFailed: a worker ended with anything but 0.
    """
    config, logs, ranks = job.config, job.run_dir / "logs", world_size(job.config)
    terminal = tasks.spec(config.task).terminal(config)
    training, gpu = config.task.facts.trains, config.cluster.device is Device.gpu
    records = local.Tail(job.run_dir / "metrics.jsonl")
    # A single rank waits for no other.
    watchdog = Watchdog(logs, ranks, config.cluster.hang_seconds if ranks > 1 else 0, records.path)
    heartbeat.clear(logs)
    server, sizes = external.server(), external.log_sizes(logs, ranks)
    role, share = server.role, server.role.share(ranks)
    keep = WorkerEnv.from_env(os.environ).slot_locks + ((lock.descriptor,) if lock else ())
    server.hand_over(job.run_dir, file, share)
    peers = server.peers(logs, sizes, share)
    if role.starter and share == 1:
        descriptors = tuple(peer.connection.socket.fileno() for peer in peers if peer.connection)
        settings = WorkerEnv(terminal=terminal, peers=descriptors, log_sizes=sizes, concludes=True)
        external.become_worker(role, job, file, settings, keep)
    with console.progress(config.trainer.max_steps if training else None) as progress:

        def poll() -> Outcome | None:
            progress.records(records.lines())
            stuck = watchdog.stuck()
            return Outcome(GUARD, reason=stuck) if stuck else None

        def choose() -> list[RankEnv]:
            if role.starter:
                return rank_env.places(role, os.environ, ranks, gpu=gpu)
            return rank_env.here(ranks, gpu=gpu)

        settings = WorkerEnv(parent=os.getpid(), live=progress.live, terminal=terminal)
        outcome = local.run_workers(
            ["-m", "gpt.worker", str(job.run_dir), str(file)],
            choose,
            logs,
            local.environment(config, role.here(ranks), settings),
            show=progress.line,
            poll=poll,
            others=peers,
            hand_over=keep,
            terminal=terminal,
            retry=not role.starter,
        )
        poll()
    if outcome.code:
        raise JobFailed(*outcome.report(logs, watchdog.missing))
