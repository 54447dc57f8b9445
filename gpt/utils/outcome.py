"""How a job ended, and which of several failing ranks was the cause."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Protocol

from gpt.utils.signals import BAD_INPUT, FAILED, GUARD

STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
SHOWN_LINES = 15
READ_LINES = 60  # a reason may stand above a long trace
SETTLE_SECONDS = 0.3  # ranks that fail together are compared before one is blamed
VICTIM_SECONDS = 3.0  # a lost connection has a cause, whose process may still be dying
GRACE_SECONDS = 60.0  # from a signal to SIGKILL: time to finish the step and to save
END_SECONDS = 5.0  # for what is ended without having to save

# What Gloo, NCCL and Paddle's store say when the other side is gone. Paddle's Gloo calls any lost pair a TIMEOUT.
_LOST = re.compile(
    r"connection (was )?(closed|reset|refused|lost|timed out|timeout)|closed by peer|broken pipe"
    r"|socket (closed|timeout)|gloo/transport/\S+ TIMEOUT|TIMEOUT self_rank"
    r"|remote process (has )?(exited|terminated)|ncclRemoteError|ncclSystemError",
    re.IGNORECASE,
)
_WAITED = re.compile(r"gloo/transport/\S+ TIMEOUT|TIMEOUT self_rank")
# Paddle 3.3's store does not say so: it fails an assertion of libuv when it cannot bind.
_PORT_TAKEN = re.compile(
    r"address (is )?already in use|EADDRINUSE|address in use|uv__finish_close: Assert", re.IGNORECASE
)


@dataclass(frozen=True)
class Outcome:
    """How a job ended: the exit code of the first rank that failed, or 0; with the end of that rank's log.

    ``signal`` is what the driver was sent and passed on, if anything. ``reason`` is a sentence if it was not a rank's
    own end that ended the job.
    """

    code: int
    rank: int = 0
    last_lines: tuple[str, ...] = ()
    signal: signal.Signals | None = None
    reason: str = ""

    @classmethod
    def of(cls, rank: RankHandle, sent: Signals | None = None) -> Outcome:
        """Return the outcome of a job that a rank's failure has ended.

        Args:
            rank: which has failed.
            sent: the signal that the job was sent, if any.
        """
        assert rank.code
        return cls(rank.code, rank.rank, rank.last_lines(), sent)

    def report(self, logs: Path, missing: Callable[[], str]) -> tuple[str, int]:
        """Return the message for the user, "" if rank 0 has printed the reason, and the exit code of the job.

        Args:
            logs: directory of the logs.
            missing: names the ranks that are behind the others.
        """
        if self.reason:
            return self.reason, self.code
        if self.waited and not self.signal:  # Paddle's Gloo gives up after 30 s, long before the watchdog
            message = f"STOPPED: worker {self.rank} timed out waiting for other ranks. {missing()}"
            return f"{message}; the logs: {logs}/worker.R.log", GUARD
        stopped = self.signal and self.code == 128 + self.signal
        if stopped or (self.code == BAD_INPUT and self.rank == 0):
            return "", self.code
        if self.signal and self.code < 0:
            return f"ended by {self.signal.name} before it could save", 128 + self.signal
        if self.code < 0:
            name = signal.Signals(-self.code).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            message = f"worker {self.rank} was ended by {name}{hint}; the same command goes on from the last checkpoint"
            return f"{message}{self.shown}", FAILED
        message = f"worker {self.rank} ended with exit code {self.code}; its log: {logs}/worker.{self.rank}.log"
        return f"{message}{self.shown if self.rank else ''}", self.code  # rank 0's lines are on the terminal

    @property
    def shown(self) -> str:
        """The last lines as they are put below a message."""
        return "".join(f"\n  | {line}" for line in self.last_lines[-SHOWN_LINES:])

    @property
    def waited(self) -> bool:
        """Whether the rank failed because it had waited for the others in vain, none of which had failed."""
        return self.code != 0 and any(_WAITED.search(line) for line in self.last_lines)

    @property
    def port_taken(self) -> bool:
        """Whether another program took one of the job's ports before the job did."""
        return self.code != 0 and any(_PORT_TAKEN.search(line) for line in self.last_lines)


def last_lines(log: Path, begin: int) -> tuple[str, ...]:
    """Return the last lines of a log that were written after its first ``begin`` bytes."""
    try:
        with open(log, "rb") as file:
            file.seek(max(begin, log.stat().st_size - 64 * 1024))
            return tuple(file.read().decode("utf-8", errors="replace").splitlines()[-READ_LINES:])
    except OSError:
        return ()


class RankHandle(Protocol):
    """A rank on this host or elsewhere. ``ended`` is when its end was noticed, on this machine's clock."""

    rank: int
    ended: float | None

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""

    def last_lines(self) -> tuple[str, ...]:
        """The end of its log."""

    def last_written(self) -> float:
        """When it last wrote a line, for an order among those that ended together."""

    def stop(self, number: signal.Signals) -> None:
        """Ask it to end, or end it."""

    def wait(self, seconds: float) -> bool:
        """Whether it has ended by then."""


def root_cause(workers: Sequence[RankHandle], now: float, sent: signal.Signals | None) -> RankHandle | None:
    """The rank whose failure ended the job, or None as long as that is not clear.

    A rank that left on purpose (stopped by a signal or the guard) shows what the others are about to do as well, and
    they may still be saving. A rank that only lost its connection waits for its cause to show.

    Args:
        workers: all ranks.
        now: on the clock of ``ended``.
        sent: the signal that the job was sent, if any.
    """
    failed = [worker for worker in workers if worker.code]
    if not failed:
        return None
    victims = {worker.rank for worker in failed if _lost_connection(worker)}
    purposes = {GUARD, *STOPPED, -(sent or 0)}

    def patience(worker: RankHandle) -> float:
        if worker.rank in victims:
            return VICTIM_SECONDS
        return GRACE_SECONDS if worker.code in purposes else SETTLE_SECONDS

    clear = all(worker.code is not None for worker in workers)
    if not clear and all(now - (worker.ended or now) < patience(worker) for worker in failed):
        return None
    return min(failed, key=lambda w: (w.rank in victims, w.ended or now, w.last_written(), w.rank))


def _lost_connection(worker: RankHandle) -> bool:
    if worker.code == -signal.SIGKILL:  # whatever it said before
        return False
    return any(_LOST.search(line) for line in worker.last_lines())
