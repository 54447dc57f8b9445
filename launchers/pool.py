"""Jobs side by side on the slots of this host: one process group each, one polling loop, no threads."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from gpt.files import Lock
from launchers.ending import GRACE_SECONDS
from launchers.slots import Slots, Taken

POLL_SECONDS = 0.1


@dataclass
class Entry:
    """A job that is to run.

    Attributes:
        name: in messages.
        command: the process to start; it ends with the job's exit code.
        slots: that it needs.
        log: where its output is appended.
        lock: taken before the start, and kept open by the process as ``descriptor`` number of ``lock_variable``.
        attempt: how many starts there were.
    """

    name: str
    command: list[str]
    slots: int
    log: Path
    lock: Lock
    attempt: int = 0


@dataclass
class Running:
    """A started job."""

    entry: Entry
    taken: Taken
    process: subprocess.Popen[bytes]
    began: float = field(default_factory=time.monotonic)

    def stop(self, number: signal.Signals) -> None:
        """Send a signal to its driver, which passes it on to the ranks; SIGKILL to the whole group."""
        with contextlib.suppress(ProcessLookupError):
            if number is signal.SIGKILL:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)


class Pool:
    """Runs entries until none is left.

    Args:
        slots: to share out.
        started: told of a start.
        ended: told of an end and its exit code; returns whether to start the job once more.
        elsewhere: told of an entry whose lock somebody else has; it is left to them.
        poll: called on every round with what runs and what waits.
    """

    def __init__(
        self,
        slots: Slots,
        *,
        started: Callable[[Running], None],
        ended: Callable[[Running, int], bool],
        elsewhere: Callable[[Entry], None],
        poll: Callable[[list[Running], list[Entry]], None],
    ) -> None:
        self.slots = slots
        self.running: list[Running] = []
        self.waiting: list[Entry] = []
        self.stopped_by: signal.Signals | None = None
        self._since = 0.0
        self._started, self._ended, self._elsewhere, self._poll = started, ended, elsewhere, poll

    def run(self, entries: list[Entry]) -> None:
        """Start the largest first, so that none waits for many slots behind many small ones, and watch all to their
        end. The first SIGTERM or Ctrl-C is passed on, a second one kills."""
        self.waiting = sorted(entries, key=lambda entry: -entry.slots)
        with self._signals():
            try:
                while self.waiting or self.running:
                    self._start_what_fits()
                    self._poll(self.running, self.waiting)
                    self._look()
                    time.sleep(POLL_SECONDS)
            finally:
                for job in self.running:
                    job.stop(signal.SIGKILL)

    def stop(self, number: signal.Signals) -> None:
        """Start no more and end what runs."""
        self.waiting.clear()
        for job in self.running:
            job.stop(number)

    def _start_what_fits(self) -> None:
        for entry in list(self.waiting):
            taken = self.slots.take(entry.slots)
            if taken is None:
                continue
            self.waiting.remove(entry)
            if not entry.lock.acquire():
                taken.release()
                self._elsewhere(entry)
                continue
            entry.attempt += 1
            self.running.append(self._begin(entry, taken))
            self._started(self.running[-1])

    def _begin(self, entry: Entry, taken: Taken) -> Running:
        entry.log.parent.mkdir(parents=True, exist_ok=True)
        handed = (entry.lock.descriptor, *taken.descriptors)
        with open(entry.log, "ab") as log:
            process = subprocess.Popen(
                entry.command,
                env={
                    **os.environ,
                    **self.slots.environment(taken.numbers),
                    "GPT_GRID_PID": str(os.getpid()),
                    "GPT_RUN_LOCK": str(entry.lock.descriptor),
                    "PYTHONUNBUFFERED": "1",
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=handed,
            )
        return Running(entry, taken, process)

    def _look(self) -> None:
        for job in list(self.running):
            code = job.process.poll()
            if code is None:
                if self.stopped_by and time.monotonic() - self._since > GRACE_SECONDS + 10:
                    job.stop(signal.SIGKILL)
                continue
            self.running.remove(job)
            job.entry.lock.release()
            job.taken.release()
            if self._ended(job, code) and not self.stopped_by:
                self.waiting.append(job.entry)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            self.stop(signal.SIGKILL if self.stopped_by else signal.Signals(number))
            if not self.stopped_by:
                self.stopped_by, self._since = signal.Signals(number), time.monotonic()

        former = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
