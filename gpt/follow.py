"""A process that a launcher has started: the one of rank 0 does what a user's command does, the others follow it.

Each looks after one worker, or after its host's share of them if it is the only process there. That is not a second
start: thread counts and the allocator must be in a worker's environment before it begins, and who looks after it can
end it when it hangs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Callable

from gpt import cli
from gpt.config import Device, UserError, world_size
from gpt.guard import FAILED, die_with_parent
from gpt.runs import Job
from launchers import group, local, roles
from launchers.roles import Role


def run(role: Role, command: Callable[[], object]) -> None:
    """Do this rank's part.

    Args:
        role: as detected.
        command: what rank 0 does.

    Raises:
        UserError: the ranks do not find each other, or a grid was asked for.
        SystemExit: of a rank other than 0, with the job's exit code.
    """
    if role.starter == roles.PADDLE:  # srun and mpirun end their processes themselves
        die_with_parent(os.getppid())
        roles.close_to_others(os.environ)
        roles.restore_proxies(os.environ)
    if role.rank:
        sys.exit(_follow(role))
    group.hub()  # from here on the others can find us
    if cli.wants_grid(sys.argv[1:]):
        raise UserError.of([f"a grid (-m) cannot run inside a job that {role.starter} started: start it without"])
    command()


def over(role: Role, code: int) -> None:
    """Rank 0 tells the others the exit code, at whatever point the job ended."""
    _nothing_left_to_save(role)
    if role.starter and role.rank == 0:
        with contextlib.suppress(UserError):  # said already: they could not be reached from the beginning
            group.hub().close(code)


def _nothing_left_to_save(role: Role) -> None:
    """From here on only the exit code counts.

    ``srun --kill-on-bad-exit`` ends tasks that are a moment behind the first, and would report their SIGTERM.
    """
    if role.starter == roles.SLURM:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _follow(role: Role) -> int:
    """Wait for rank 0's job, run this process's workers on it; returns the exit code."""
    member = group.Member(role)
    where = member.wait_for_job()
    if where is None:
        _nothing_left_to_save(role)
        if member.over is None:
            print("rank 0 ended before there was a job; its own output says why", file=sys.stderr)
        return FAILED if member.over is None else member.over
    run_dir, file = where
    job = Job.read(run_dir, file)
    ranks, gpu = world_size(job.config), job.config.cluster.device is Device.gpu
    ours = roles.places(role, os.environ, ranks, gpu=gpu)
    outcome = local.run_workers(
        ["-m", "gpt.worker", str(run_dir), str(file)],
        lambda: ours,
        run_dir / "logs",
        local.environment(job.config, role.here(ranks), live=False),
        show=lambda line: None,  # rank 0 is what is shown
        poll=member.poll,
        retry=False,
    )
    _nothing_left_to_save(role)
    if outcome.reason or not outcome.code:  # it is about all of them
        outcome = dataclasses.replace(outcome, rank=ours[0].rank)
    log = run_dir / "logs" / f"worker.{outcome.rank}.log"
    if outcome.code:
        what = outcome.reason or f"rank {outcome.rank} failed"
        print(f"{what}; its log: {log}{outcome.shown}", file=sys.stderr, flush=True)
    return member.report(outcome, log.stat().st_mtime)
