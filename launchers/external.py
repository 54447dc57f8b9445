"""Run under an external launcher (Paddle's, srun, mpirun): rank 0 runs the user's command and sends the job to the
others once, then each process becomes the worker of its rank.

Where srun has started one task on every node for several ranks, the task stays, to supervise the ranks of its node.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import os
import select
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from gpt.config.cluster import Device
from gpt.config.derived import world_size
from gpt.runs.run_dir import Job
from gpt.utils import launch_env
from gpt.utils.errors import UserError
from gpt.utils.launch_env import LaunchEnvironment, WorkerEnv
from gpt.utils.outcome import Outcome
from gpt.utils.peers import Connection, Peer
from gpt.utils.signals import FAILED, die_with_parent
from gpt.utils.watchdog import named
from launchers import local, rank_env
from launchers.rank_env import RankEnv

JOIN_SECONDS = 300.0  # the ranks of a job may start minutes apart on a busy file system
LATE_SECONDS = 20.0  # for ranks that start when the job is over already
OVER_SECONDS = 30.0  # after a failure, for rank 0 to announce the exit code of the job


def run(role: LaunchEnvironment, command: Callable[[], object]) -> None:
    """Run this process's part of the job.

    Raises:
        UserError: the ranks do not reach each other, or the command is a grid.
        SystemExit: on a process other than rank 0's, with the job's exit code.
    """
    if role.starter == launch_env.PADDLE:  # srun and mpirun end their processes themselves
        die_with_parent(os.getppid())
        rank_env.close_to_others(os.environ)
        rank_env.restore_proxies(os.environ)
    if role.rank:
        sys.exit(_follow(role))
    server()  # from here on the others can connect
    from gpt import cli  # Hydra's side, which a frozen cell never needs

    if cli.wants_grid(sys.argv[1:]):
        raise UserError.of([f"a grid (-m) cannot run inside a job that {role.starter} started: start it without"])
    command()


def over(role: LaunchEnvironment, code: int) -> None:
    """Announce the exit code of the job to the other processes, at whatever point it ended."""
    _ignore_sigterm(role)
    if role.starter and role.rank == 0:
        with contextlib.suppress(UserError):  # reported already: rank 0 could not listen
            server().close(code)


def _ignore_sigterm(role: LaunchEnvironment) -> None:
    """Ignore the SIGTERM of ``srun --kill-on-bad-exit`` after the first end: now only the exit code counts."""
    if role.starter == launch_env.SLURM:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class JobServer:
    """Listener of rank 0; it does nothing in a process that was started alone."""

    def __init__(self, role: LaunchEnvironment) -> None:
        self.role = role
        self.connections: dict[int, Connection] = {}  # by process
        self._listener: socket.socket | None = None
        if role.world > 1:
            self._place = rank_env.place(role, os.environ)
            self._listener = _listen_on(self._place.endpoints[0], role.world)

    def hand_over(self, run_dir: Path, job_file: Path, share: int) -> None:
        """Wait for all processes and send them the job.

        Raises:
            UserError: some processes did not connect.
        """
        self._accept(JOIN_SECONDS)
        missing = set(range(1, self.role.world)) - set(self.connections)
        if missing:
            ranks = [process * share + local for process in missing for local in range(share)]
            raise UserError(
                f"{named(ranks)} of {self.role.world * share} did not connect within {JOIN_SECONDS:.0f} s to "
                f"{self._place.endpoints[0]}: see their logs, and whether they can reach that address"
            )
        for connection in self.connections.values():
            connection.send({"run_dir": str(run_dir), "job_file": str(job_file.resolve())})

    def peers(self, logs: Path, log_sizes: Sequence[int], share: int) -> list[Peer]:
        """Return the other processes, for rank 0's driver to watch."""
        return [Peer(n * share, connection, logs, log_sizes) for n, connection in sorted(self.connections.items())]

    def _accept(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._listener and len(self.connections) < self.role.world - 1:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._listener], [], [], left)[0]:
                return
            connection = Connection(self._listener.accept()[0])
            hello = next(connection.receive(5.0), {})
            if hello.get("job") == _key(self._place):  # else another program, which mistook the port
                self.connections[int(hello["process"])] = connection
            else:
                connection.socket.close()
        if self._listener:
            self._listener.close()  # Paddle may have the port now
            self._listener = None

    def close(self, code: int) -> None:
        """Send the job's exit code to all processes, also to those that have only just started."""
        self._accept(LATE_SECONDS)
        for connection in self.connections.values():
            connection.send({"over": code})
            connection.socket.close()
        self.connections = {}


@functools.cache
def server() -> JobServer:
    """Return this process's server."""
    return JobServer(launch_env.detect(os.environ))


def _key(place: RankEnv) -> int:
    """Return the identifier of a job; short, so that it arrives in one piece."""
    return zlib.crc32(",".join(place.endpoints).encode())


def _listen_on(endpoint: str, backlog: int) -> socket.socket:
    host, _, port = endpoint.rpartition(":")
    try:
        return socket.create_server((host, int(port)), backlog=backlog)
    except OSError as error:
        if (error.errno or 0) < 0:  # of the resolver; create_server makes it a plain OSError
            why = f"the name {host} is not known here; give it an address, in the hosts file or the launcher's settings"
        elif error.errno == errno.EADDRINUSE:
            why = f"port {port} is taken, perhaps by another job; end that, or start this one again"
        elif error.errno == errno.EADDRNOTAVAIL:
            why = f"{host} is not an address of this host, where rank 0 was started"
        else:
            why = str(error.strerror)
        raise UserError(f"rank 0 cannot listen on {endpoint}: {why}") from None


def _connect(endpoint: str, seconds: float) -> Connection:
    host, _, port = endpoint.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection = socket.create_connection((host, int(port)), timeout=5.0)
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(f"rank 0 did not answer at {endpoint} within {seconds:.0f} s ({error})") from None
            time.sleep(0.1)
        else:
            if connection.getsockname() != connection.getpeername():
                connection.settimeout(None)
                return Connection(connection)
            # Linux lets a free port of its own range connect to itself; rank 0 could not listen there then.
            connection.close()
            time.sleep(0.1)


def log_sizes(logs: Path, ranks: int) -> tuple[int, ...]:
    """Return the bytes of all ranks' logs, to which this start appends."""
    files = [logs / f"worker.{rank}.log" for rank in range(ranks)]
    return tuple(file.stat().st_size if file.exists() else 0 for file in files)


def become_worker(
    role: LaunchEnvironment, job: Job, file: Path, settings: WorkerEnv, keep: Sequence[int] = ()
) -> NoReturn:
    """Replace this process by the worker of its rank.

    Args:
        role: of this process.
        job: to run.
        file: of the job.
        settings: of the worker.
        keep: further descriptors that it keeps open.
    """
    ranks, logs = world_size(job.config), job.run_dir / "logs"
    (place,) = rank_env.places(role, os.environ, ranks, gpu=job.config.cluster.device is Device.gpu)
    logs.mkdir(parents=True, exist_ok=True)
    log = open(logs / f"worker.{place.rank}.log", "ab")  # noqa: SIM115 - the worker's
    settings = dataclasses.replace(settings, parent=os.getppid(), hang_seconds=job.config.cluster.hang_seconds)
    sys.stdout.flush()
    sys.stderr.flush()
    target = log.fileno()
    if not role.rank:  # also shown; tee ends when the worker has
        command = ["tee", "-a", log.name]
        tee = subprocess.Popen(command, stdin=subprocess.PIPE, preexec_fn=_ignore_signals)  # noqa: PLW1509 - one thread
        assert tee.stdin
        target = tee.stdin.fileno()
    if not settings.terminal:
        os.dup2(target, sys.stdout.fileno())
    os.dup2(target, sys.stderr.fileno())
    for descriptor in (*settings.peers, *keep):
        os.set_inheritable(descriptor, True)
    env = {**local.environment(job.config, role.here(ranks), settings), **place.variables()}
    os.execve(sys.executable, [sys.executable, "-m", "gpt.worker", str(job.run_dir), str(file)], env)


def _ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _follow(role: LaunchEnvironment) -> int:
    """Wait for rank 0's job and become its worker, or run the workers of this node; returns the exit code."""
    place = rank_env.place(role, os.environ)
    connection = _connect(place.endpoints[0], JOIN_SECONDS)
    connection.send({"process": role.rank, "job": _key(place)})
    message: dict[str, object] = {}
    while not message and connection.open:
        message = next(connection.receive(60.0), {})
    if "run_dir" not in message:
        _ignore_sigterm(role)
        if "over" not in message:
            print("rank 0 ended before there was a job; its own output says why", file=sys.stderr)
        return int(str(message.get("over", FAILED)))
    run_dir, file = Path(str(message["run_dir"])), Path(str(message["job_file"]))
    job = Job.read(run_dir, file)
    if role.share(world_size(job.config)) > 1:
        return _supervise(role, connection, job, file)
    become_worker(role, job, file, WorkerEnv(peers=(connection.socket.fileno(),)))


def _supervise(role: LaunchEnvironment, connection: Connection, job: Job, file: Path) -> int:
    """Run the workers of this node; returns the exit code of the whole job."""
    ranks, code = world_size(job.config), 0
    places = rank_env.places(role, os.environ, ranks, gpu=job.config.cluster.device is Device.gpu)

    def poll() -> Outcome | None:
        nonlocal code
        connected = connection.open
        for message in connection.receive():
            code = int(message.get("over", 0)) or code
            return Outcome(code or FAILED, reason="the job was ended by another rank")
        if connection.open is not connected:
            signal.raise_signal(signal.SIGTERM)  # rank 0 is gone: the workers save and end
        return None

    outcome = local.run_workers(
        ["-m", "gpt.worker", str(job.run_dir), str(file)],
        lambda: places,
        job.run_dir / "logs",
        local.environment(job.config, role.here(ranks), WorkerEnv(parent=os.getpid())),
        show=lambda line: None,  # rank 0 is shown
        poll=poll,
        retry=False,
    )
    _ignore_sigterm(role)
    rank = places[0].rank if outcome.reason or not outcome.code else outcome.rank
    if outcome.code:
        reason = outcome.reason or f"rank {rank} failed"
        log = job.run_dir / "logs" / f"worker.{rank}.log"
        print(f"{reason}; its log: {log}{outcome.shown}", file=sys.stderr, flush=True)
    connection.send({"code": outcome.code, "rank": rank})
    deadline = time.monotonic() + OVER_SECONDS
    while outcome.code and not code and connection.open and (left := deadline - time.monotonic()) > 0:
        for message in connection.receive(left):
            code = int(message.get("over", code))
    return code or (outcome.code if outcome.code >= 0 else FAILED)
