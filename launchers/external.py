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

from gpt.config.cluster import Device
from gpt.config.derived import world_size
from gpt.runs.run_dir import Job
from gpt.utils import launch_env
from gpt.utils.errors import UserError
from gpt.utils.launch_env import LaunchEnvironment
from gpt.utils.signals import FAILED, die_with_parent
from launchers import local, rank_env, rendezvous


def run(role: LaunchEnvironment, command: Callable[[], object]) -> None:
    """Do this rank's part.

    Args:
        role: as detected.
        command: what rank 0 does.

    Raises:
        UserError: the ranks do not find each other, or a grid was asked for.
        SystemExit: of a rank other than 0, with the job's exit code.
    """
    if role.starter == launch_env.PADDLE:  # srun and mpirun end their processes themselves
        die_with_parent(os.getppid())
        rank_env.close_to_others(os.environ)
        rank_env.restore_proxies(os.environ)
    if role.rank:
        sys.exit(_follow(role))
    rendezvous.hub()  # from here on the others can find us
    from gpt import cli  # Hydra's side, which a frozen cell never needs

    if cli.wants_grid(sys.argv[1:]):
        raise UserError.of([f"a grid (-m) cannot run inside a job that {role.starter} started: start it without"])
    command()


def over(role: LaunchEnvironment, code: int) -> None:
    """Rank 0 tells the others the exit code, at whatever point the job ended."""
    _nothing_left_to_save(role)
    if role.starter and role.rank == 0:
        with contextlib.suppress(UserError):  # said already: they could not be reached from the beginning
            rendezvous.hub().close(code)


def _nothing_left_to_save(role: LaunchEnvironment) -> None:
    """From here on only the exit code counts.

    ``srun --kill-on-bad-exit`` ends tasks that are a moment behind the first, and would report their SIGTERM.
    """
    if role.starter == launch_env.SLURM:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _follow(role: LaunchEnvironment) -> int:
    """Wait for rank 0's job, run this process's workers on it; returns the exit code."""
    member = rendezvous.RendezvousClient(role)
    where = member.wait_for_job()
    if where is None:
        _nothing_left_to_save(role)
        if member.over is None:
            print("rank 0 ended before there was a job; its own output says why", file=sys.stderr)
        return FAILED if member.over is None else member.over
    run_dir, file = where
    job = Job.read(run_dir, file)
    ranks, gpu = world_size(job.config), job.config.cluster.device is Device.gpu
    ours = rank_env.places(role, os.environ, ranks, gpu=gpu)
    outcome = local.run_workers(
        ["-m", "gpt.worker", str(run_dir), str(file)],
        lambda: ours,
        run_dir / "logs",
        local.environment(job.config, role.here(ranks)),
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
