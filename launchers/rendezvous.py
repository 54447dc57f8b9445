"""Processes that a launcher has started: rank 0 tells the others which run it is, they tell it how their ranks ended.

A connection per process, kept for the whole job, with a line of JSON per message; it leads to rank 0's endpoint, which
every launcher makes known. Nothing is left behind that a later job could mistake for its own, and a process that is
gone shows as a closed connection.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import select
import signal
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt.utils import launch_env
from gpt.utils.errors import UserError
from gpt.utils.launch_env import LaunchEnvironment
from gpt.utils.signals import FAILED
from launchers import rank_env
from launchers.outcome import Outcome
from launchers.rank_env import RankEnv
from launchers.watchdog import named

JOIN_SECONDS = 300.0  # the ranks of a job may start minutes apart on a busy file system
LATE_SECONDS = 20.0  # for ranks that come when the job is over already
OVER_SECONDS = 30.0  # after a failure, for rank 0 to say what the exit code of all is
Message = dict[str, Any]


class _JsonConnection:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that is gone shows, in time
        self._socket = connection
        self._partial = b""
        self.open = True

    def send(self, message: Message) -> None:
        """Say something; if nobody is there, reading will show it."""
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float = 0.0) -> Iterator[Message]:
        """What has come, waiting for something if need be; ``open`` is false once the other side is gone."""
        if not self.open or not select.select([self._socket], [], [], seconds)[0]:
            return
        try:
            new = self._socket.recv(1 << 16)
        except OSError:
            new = b""
        self.open = bool(new)
        *whole, self._partial = (self._partial + new).split(b"\n")
        for text in whole:
            with contextlib.suppress(ValueError):
                message = json.loads(text)
                if isinstance(message, dict):
                    yield message

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


class RemoteRank:
    """A process elsewhere, as rank 0 sees it: ``rank`` is the first it looks after, or the one that failed."""

    def __init__(self, process: int, line: _JsonConnection) -> None:
        self.process = self.rank = process
        self.ended: float | None = None
        self.line = line
        self._end: Message = {}
        self._told = False

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        self._listen(0.0)
        return int(self._end["code"]) if self._end else None

    def _listen(self, seconds: float) -> None:
        for message in self.line.receive(seconds) if not self._end else ():
            if "code" in message:
                self._end = message
                self.rank = message["rank"] if message["code"] else self.rank
        if not self.line.open and not self._end:
            self._end = {"code": FAILED, "lines": [f"the process that looked after rank {self.rank} vanished"]}
        if self._end and self.ended is None:
            self.ended = time.monotonic()

    def last_lines(self) -> tuple[str, ...]:
        """The end of its log, as it was told."""
        return tuple(self._end.get("lines", ()))

    def last_written(self) -> float:
        """When it last wrote a line."""
        return float(self._end.get("written", 0.0))

    def stop(self, number: signal.Signals) -> None:
        """The job is over: its own process ends the worker, by ``number``'s kinder or harder way."""
        if not self._told:
            self.line.send({"stop": int(number)})
            self._told = True

    def wait(self, seconds: float) -> bool:
        """Whether it has ended by then."""
        deadline = time.monotonic() + seconds
        while self.code is None and (left := deadline - time.monotonic()) > 0:
            self._listen(left)
        return self.code is not None


class RendezvousServer:
    """Rank 0's side. Of a process that was started alone it has nobody to talk to, and does nothing."""

    def __init__(self, role: LaunchEnvironment) -> None:
        self.role = role
        self.remotes: list[RemoteRank] = []
        self._listener: socket.socket | None = None
        if role.world > 1:
            self.place = rank_env.place(role, os.environ)
            self._listener = _listen_on(self.place.endpoints[0], role.world)

    def announce(self, run_dir: Path, job_file: Path, share: int) -> None:
        """Wait for all ranks and send them to the job.

        Args:
            run_dir: of the job.
            job_file: in it.
            share: ranks that each process looks after.

        Raises:
            UserError: some did not come.
        """
        self._join(JOIN_SECONDS)
        missing = set(range(1, self.role.world)) - {remote.process for remote in self.remotes}
        if missing:
            ranks = [process * share + local for process in missing for local in range(share)]
            raise UserError(
                f"{named(ranks)} of {self.role.world * share} did not come within {JOIN_SECONDS:.0f} s to "
                f"{self.place.endpoints[0]}: see their logs, and whether they can reach that address"
            )
        for remote in self.remotes:
            remote.rank = remote.process * share
            remote.line.send({"run_dir": str(run_dir), "job_file": str(job_file.resolve())})

    def _join(self, seconds: float) -> None:
        """Take in who comes, until all are here or the time is over."""
        deadline = time.monotonic() + seconds
        while self._listener and len(self.remotes) < self.role.world - 1:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._listener], [], [], left)[0]:
                return
            line = _JsonConnection(self._listener.accept()[0])
            hello = next(line.receive(5.0), {})
            if hello.get("job") == _key(self.place):  # else somebody who mistook the port
                self.remotes.append(RemoteRank(int(hello["process"]), line))
            else:
                line.close()
        if self._listener:
            self._listener.close()  # Paddle may have the port now
            self._listener = None

    def close(self, code: int) -> None:
        """Tell all ranks the job's exit code, also those that have only just come."""
        self._join(LATE_SECONDS)
        for remote in self.remotes:
            remote.line.send({"over": code})
            remote.line.close()
        self.remotes = []


@functools.cache
def hub() -> RendezvousServer:
    """This process's, made when it is first asked for."""
    return RendezvousServer(launch_env.detect(os.environ))


def _key(place: RankEnv) -> int:
    """What all ranks of a job know and no other job does; short, so that it comes in one piece."""
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


class RendezvousClient:
    """The side of every other process."""

    def __init__(self, role: LaunchEnvironment) -> None:
        self.role = role
        self.place = rank_env.place(role, os.environ)
        self._line = _connected(self.place.endpoints[0], JOIN_SECONDS)
        self._line.send({"process": role.rank, "job": _key(self.place)})
        self.over: int | None = None

    def wait_for_job(self) -> tuple[Path, Path] | None:
        """The run directory and the job's file; None if there is nothing to do, then ``over`` is why."""
        while self._line.open:
            for message in self._line.receive(60.0):
                if "run_dir" in message:
                    return Path(message["run_dir"]), Path(message["job_file"])
                if "over" in message:
                    self.over = int(message["over"])
                    return None
        return None

    def poll(self) -> Outcome | None:
        """An outcome if rank 0 says that the job is over; if rank 0 is gone, our workers are to save and end."""
        connected = self._line.open
        for message in self._line.receive():
            if "over" in message:
                self.over = int(message["over"])
            return Outcome(self.over or FAILED, reason="the job was ended by another rank")
        if self._line.open is not connected:
            signal.raise_signal(signal.SIGTERM)
        return None

    def report(self, outcome: Outcome, written: float) -> int:
        """Tell rank 0 how our ranks ended; returns the exit code of the whole job."""
        lines = list(outcome.last_lines)
        self._line.send({"code": outcome.code, "rank": outcome.rank, "lines": lines, "written": written})
        deadline = time.monotonic() + OVER_SECONDS
        while outcome.code and self.over is None and self._line.open and (left := deadline - time.monotonic()) > 0:
            for message in self._line.receive(left):
                self.over = message.get("over", self.over)
        return self.over or (outcome.code if outcome.code >= 0 else FAILED)


def _connected(endpoint: str, seconds: float) -> _JsonConnection:
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
                return _JsonConnection(connection)
            # Linux lets a free port of its own range connect to itself; rank 0 could not listen there then.
            connection.close()
            time.sleep(0.1)
