"""Jobs side by side on the slots of this host: a process group each, one polling loop, no threads.

Who goes first: the largest. What does not fit lets smaller jobs pass, until as many jobs have started on this host
(of whichever grid) as it has slots; from then on slots that come free are kept for it and nobody else starts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Protocol

from gpt.utils.files import Lock
from gpt.utils.launch_env import WorkerEnv
from launchers.outcome import END_SECONDS, GRACE_SECONDS
from launchers.sweep.slots import SlotLease, Slots

POLL_SECONDS = 0.1
ELSEWHERE_SECONDS = 1.0  # between looks at what somebody else runs


@dataclass
class PoolJob:
    """A job that is to run.

    Attributes:
        name: in messages.
        command: the process to start; it ends with the job's exit code.
        slots: that it needs.
        log: where its output is appended.
        lock: taken before the start, and kept open by the process. Two entries with the same one never run at once.
        attempt: how many starts there were.
        passed: starts on this host when it first did not fit.
    """

    name: str
    command: list[str]
    slots: int
    log: Path
    lock: Lock
    attempt: int = 0
    passed: int | None = None


@dataclass
class Running:
    """A started job. ``output`` is where its part of the log begins."""

    entry: PoolJob
    taken: SlotLease
    process: subprocess.Popen[bytes]
    output: int
    began: float = field(default_factory=time.monotonic)
    pruned: bool = False

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal to its driver, which passes it on to the ranks."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def prune(self) -> None:
        """End this one: it saves, and is not started again."""
        if not self.pruned:
            self.pruned = True
            self.stop()


class PoolListener(Protocol):
    """Who is told what happens."""

    def wanted(self, entry: PoolJob) -> bool:
        """Asked when its lock is ours, before the start: somebody else may have done it meanwhile."""

    def started(self, job: Running) -> None:
        """It runs."""

    def ended(self, job: Running, code: int) -> bool:
        """It does not; negative codes are signals. Whether to start it once more."""

    def elsewhere(self, entry: PoolJob) -> None:
        """Somebody else has its lock. It is left to them, and taken over if they let go of it while we are here."""

    def poll(self, running: list[Running], waiting: list[PoolJob]) -> None:
        """Every round."""


class Pool:
    """Runs entries until none is left.

    Attributes:
        running, waiting: entries by what they do.
        elsewhere: those that others run; at the end, those that they still run.
        stopped_by: the signal that ended it all.
    """

    def __init__(self, slots: Slots, watcher: PoolListener) -> None:
        self.slots = slots
        self.watcher = watcher
        self.running: list[Running] = []
        self.waiting: list[PoolJob] = []
        self.elsewhere: list[PoolJob] = []
        self.stopped_by: signal.Signals | None = None
        self._received: list[int] = []
        self._deadline: float | None = None  # for what still runs when all is to end
        self._looked = 0.0

    def run(self, entries: list[PoolJob]) -> None:
        """Start what fits and watch all to their end. The first SIGTERM or Ctrl-C is passed on, and all save; a second
        one ends them at once."""
        self.add(entries)
        with self._signals():
            try:
                while self.waiting or self.running or self._freed():
                    self.step()
                    self.watcher.poll(self.running, self.waiting)
                    time.sleep(POLL_SECONDS)
            finally:  # of an error of ours; they save and end by themselves
                self.slots.let_go()
                for job in self.running:
                    job.stop()

    def add(self, entries: list[PoolJob]) -> None:
        """Let them wait, the largest in front."""
        self.waiting = sorted([*self.waiting, *entries], key=lambda entry: -entry.slots)

    def step(self) -> None:
        """See what has ended, and start what fits."""
        self._obey()
        self._look()
        if self.elsewhere and time.monotonic() - self._looked > ELSEWHERE_SECONDS:
            self._freed()
        self._start_what_fits()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Start no more and end what runs."""
        self.waiting.clear()
        self.slots.let_go()
        self._deadline = self._deadline or time.monotonic() + GRACE_SECONDS + END_SECONDS
        for job in self.running:
            job.stop(number)

    def _start_what_fits(self) -> None:
        in_use = {job.entry.lock.path for job in self.running}
        first, fits = True, self.slots.count
        for entry in [entry for entry in self.waiting if entry.lock.path not in in_use]:
            if entry.slots > fits or entry.lock.path in in_use or entry not in self.waiting:
                continue
            if (taken := self._take(entry, first)) is None:
                if first and self._its_turn(entry):
                    return
                first, fits = False, entry.slots - 1
                if not fits:
                    return
                continue
            self._begin(entry, taken)
            in_use.add(entry.lock.path)

    def _take(self, entry: PoolJob, first: bool) -> SlotLease | None:
        taken = self.slots.take(entry.slots, keep=first and self._its_turn(entry))
        if taken is None and first and entry.passed is None:
            entry.passed = self.slots.starts()
        return taken

    def _its_turn(self, entry: PoolJob) -> bool:
        """Whether enough others have passed it."""
        return entry.passed is not None and self.slots.starts() - entry.passed >= self.slots.count

    def _begin(self, entry: PoolJob, taken: SlotLease) -> None:
        self.waiting.remove(entry)
        if not entry.lock.acquire():
            taken.release()
            self.elsewhere.append(entry)
            self.watcher.elsewhere(entry)
            return
        if not self.watcher.wanted(entry):
            taken.release()
            entry.lock.release()
            return
        entry.attempt += 1
        entry.passed = None
        job = self._start(entry, taken)
        self.running.append(job)
        self.watcher.started(job)

    def _start(self, entry: PoolJob, taken: SlotLease) -> Running:
        entry.log.parent.mkdir(parents=True, exist_ok=True)
        settings = WorkerEnv(
            parent=os.getpid(),
            cores=self.slots.cores(taken.numbers),
            run_lock=entry.lock.descriptor,
            slot_locks=taken.descriptors,
        )
        with open(entry.log, "ab") as log:
            output = log.tell()
            process = subprocess.Popen(
                entry.command,
                env={
                    **os.environ,
                    **self.slots.visible_gpus(taken.numbers),
                    **settings.to_env(),
                    "PYTHONUNBUFFERED": "1",
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(entry.lock.descriptor, *taken.descriptors),
            )
        return Running(entry, taken, process, output)

    def _look(self) -> None:
        for job in list(self.running):
            code = job.process.poll()
            if code is None:
                if self._deadline and time.monotonic() > self._deadline:
                    job.stop(signal.SIGKILL)
                continue
            self.running.remove(job)
            job.entry.lock.release()
            job.taken.release()
            if self.watcher.ended(job, code) and not self._deadline:
                self.add([job.entry])

    def _freed(self) -> bool:
        """Whether somebody has let go of what they ran; it is ours then, unless it is done."""
        self._looked = time.monotonic()
        freed = [entry for entry in self.elsewhere if not self._deadline and entry.lock.acquire()]
        for entry in freed:
            entry.lock.release()
            self.elsewhere.remove(entry)
        self.add(freed)
        return bool(freed)

    def _obey(self) -> None:
        """What signals came meanwhile."""
        while self._received:
            number = signal.Signals(self._received.pop(0))
            if self.stopped_by:  # their drivers end them at a second signal; who does not obey that is killed
                self._deadline = time.monotonic() + END_SECONDS
            self.stopped_by = self.stopped_by or number
            self.stop(number)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            self._received.append(number)

        former = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
