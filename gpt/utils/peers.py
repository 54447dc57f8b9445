"""How the ranks of a job end together where an external launcher (srun, mpirun, Paddle's) has started them.

Every process has a connection to the process of rank 0, over which it reports its exit code and learns that of the
job; a process that is gone shows as a closed connection. So a job ends within seconds of a failure even where the
launcher does not end the other ranks, and all ranks end with the exit code of the one that failed first.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gpt.utils.launch_env import WorkerEnv
from gpt.utils.outcome import END_SECONDS, STOPPED, Outcome, last_lines, root_cause
from gpt.utils.signals import FAILED, GUARD
from gpt.utils.watchdog import Watchdog

POLL_SECONDS = 0.1
OVER_SECONDS = 90.0  # for rank 0 to announce the job's exit code, after ranks that still save
BACKUP_SECONDS = 10.0  # after which rank 1 ends a hang, if rank 0 itself is stopped
Message = dict[str, Any]


class Connection:
    """A socket with a line of JSON per message."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # detects a host that is gone
        self.socket = connection
        self._partial = b""
        self.open = True

    def send(self, message: Message) -> None:
        """Send a message; a closed connection is noticed on reading."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float = 0.0) -> Iterator[Message]:
        """Yield the messages that arrive within that time; ``open`` is false once the other side is gone."""
        if not self.open or not select.select([self.socket], [], [], seconds)[0]:
            return
        try:
            chunk = self.socket.recv(1 << 16)
        except OSError:
            chunk = b""
        self.open = bool(chunk)
        *lines, self._partial = (self._partial + chunk).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict):
                    yield message


class Peer:
    """A rank as rank 0 sees it, with its log on the file system that all ranks share.

    Args:
        rank: the first that the process runs, until it reports which one failed.
        connection: to its process; None: rank 0 itself, whose ``code`` is set by ``report``.
        logs: directory of the logs.
        log_sizes: bytes of all ranks' logs before this start.
    """

    def __init__(self, rank: int, connection: Connection | None, logs: Path, log_sizes: Sequence[int]) -> None:
        self.rank, self.connection = rank, connection
        self._logs, self._log_sizes = logs, log_sizes
        self._code: int | None = None
        self.ended: float | None = None
        self.vanished = False

    @property
    def code(self) -> int | None:
        """Exit code; None while it runs."""
        self._listen(0.0)
        return self._code

    def report(self, code: int) -> None:
        """Set the exit code."""
        self._code, self.ended = code, time.monotonic()

    def _listen(self, seconds: float) -> None:
        if not self.connection or self._code is not None:
            return
        for message in self.connection.receive(seconds):
            if "code" in message:
                self.rank = message["rank"] if message["code"] else self.rank
                self.report(int(message["code"]))
        if not self.connection.open and self._code is None:
            self.vanished = True
            self.report(FAILED)

    def last_lines(self) -> tuple[str, ...]:
        """Return the end of the rank's log of this start."""
        lines = last_lines(self._log, self._log_sizes[self.rank])
        if self.vanished:
            lines += (f"the process of rank {self.rank} vanished: it was killed, or its host is gone",)
        return lines

    def last_written(self) -> float:
        """Return the time of the last line of its log."""
        with contextlib.suppress(OSError):
            return self._log.stat().st_mtime
        return 0.0

    @property
    def _log(self) -> Path:
        return self._logs / f"worker.{self.rank}.log"

    def stop(self, number: signal.Signals) -> None:
        """Let the process end its ranks."""
        if self.connection:
            self.connection.send({"stop": int(number)})

    def wait(self, seconds: float) -> bool:
        """Return whether the rank ends within that time."""
        deadline = time.monotonic() + seconds
        while self.code is None and (left := deadline - time.monotonic()) > 0:
            self._listen(left)
        return self.code is not None


def _sent(code: int | None) -> signal.Signals | None:
    """Return the signal that a rank answered with this exit code."""
    return signal.Signals(code - 128) if code in STOPPED else None


class JobMonitor:
    """A thread in every rank that ends the rank when the job is over; that of rank 0 decides when it is.

    Args:
        run_dir: of the job.
        rank: of this process.
        settings: with the connections.
    """

    def __init__(self, run_dir: Path, rank: int, settings: WorkerEnv) -> None:
        self._rank, self._logs = rank, run_dir / "logs"
        connections = [Connection(socket.socket(fileno=descriptor)) for descriptor in settings.peers]
        ranks = int(os.environ["PADDLE_TRAINERS_NUM"])
        self._own = Peer(rank, None, self._logs, settings.log_sizes or (0,) * ranks)
        self._finished = threading.Event()
        patience = (settings.hang_seconds and settings.hang_seconds + BACKUP_SECONDS * rank) if rank < 2 else 0
        self._watchdog = Watchdog(self._logs, ranks, patience, run_dir / "metrics.jsonl")
        if rank == 0:
            peers = [Peer(other, line, self._logs, settings.log_sizes) for other, line in enumerate(connections, 1)]
            self._thread = threading.Thread(target=self._lead, args=(peers,), daemon=True)
            self._peers = peers
        else:
            self._thread = threading.Thread(target=self._follow, args=(connections[0],), daemon=True)
            self._connection = connections[0]
        self._thread.start()

    def finish(self, code: int) -> int:
        """Report this rank's exit code and return the job's. Called once, by the main thread."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher's answer to the first rank that ends; all is saved
        self._own.report(code)
        if self._rank:
            self._connection.send({"code": code, "rank": self._rank})
        elif not code and not any(peer.code for peer in self._peers):
            self._announce(0)
            return 0
        self._finished.set()
        if code or not self._rank:
            self._thread.join(OVER_SECONDS)  # it ends this process with the job's exit code
        return code

    def _announce(self, code: int) -> None:
        for peer in self._peers:
            assert peer.connection
            peer.connection.send({"over": code})

    def _lead(self, peers: Sequence[Peer]) -> None:
        ranks = [self._own, *peers]
        while True:
            stuck = self._watchdog.stuck()
            failed = root_cause(ranks, time.monotonic(), None)
            if stuck or failed:
                outcome = Outcome.of(failed, _sent(failed.code)) if failed else Outcome(GUARD, reason=stuck or "")
                message, code = outcome.report(self._logs, self._watchdog.missing)
                if message:
                    print(message, file=sys.stderr, flush=True)
                self._announce(code)
                self._exit(code)
            time.sleep(POLL_SECONDS)

    def _follow(self, connection: Connection) -> None:
        while connection.open:
            for message in connection.receive(POLL_SECONDS if self._finished.is_set() else 1.0):
                if code := message.get("over"):
                    self._exit(code)
                return  # rank 0 has done its work, and this one is about to
            if self._rank == 1 and (stuck := self._watchdog.stuck()):
                print(stuck, file=sys.stderr, flush=True)
                self._exit(GUARD)
        print("the process of rank 0 vanished", file=sys.stderr, flush=True)
        self._exit(self._own.code or FAILED)

    def _exit(self, code: int) -> NoReturn:
        """End this process; a rank at work gets a few seconds, in which a checkpoint may be completed."""
        if not self._finished.is_set():
            if code == GUARD:
                faulthandler.dump_traceback()
            os.kill(os.getpid(), signal.SIGTERM)
            self._finished.wait(END_SECONDS)
        os._exit(code)
