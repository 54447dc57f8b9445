"""Run jobs side by side on the slots of this host: a process group each, one polling loop, no threads.

The largest job starts first; smaller ones fill the slots that it leaves.
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
from gpt.utils.outcome import END_SECONDS, GRACE_SECONDS
from launchers.sweep.slots import SlotLease, Slots

POLL_SECONDS = 0.1
ELSEWHERE_SECONDS = 1.0  # between looks at jobs that another driver runs


@dataclass
class PoolJob:
    """A job that is to run.

    Attributes:
        name: in messages.
        command: the process to start; it ends with the job's exit code.
        slots: that it needs.
        log: where its output is appended.
        lock: taken before the start, and kept open by the process. Two entries with the same one never run at once.
        attempt: number of starts.
    """

    name: str
    command: list[str]
    slots: int
    log: Path
    lock: Lock
    attempt: int = 0


@dataclass
class Running:
    """A started job. ``output`` is where its part of the log begins."""

    entry: PoolJob
    lease: SlotLease
    process: subprocess.Popen[bytes]
    output: int
    began: float = field(default_factory=time.monotonic)
    pruned: bool = False

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal to the job's driver, which forwards it to the ranks."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def prune(self) -> None:
        """End the job: it saves, and is not started again."""
        if not self.pruned:
            self.pruned = True
            self.stop()


class PoolListener(Protocol):
    """Callbacks of a pool."""

    def wanted(self, entry: PoolJob) -> bool:
        """Return whether to start a job whose lock has just been taken: another driver may have done it meanwhile."""

    def started(self, job: Running) -> None:
        """Handle the start of a job."""

    def ended(self, job: Running, code: int) -> bool:
        """Handle the end of a job; return True to start it once more. Negative codes are signals."""

    def held_by_other(self, entry: PoolJob) -> None:
        """Handle a job whose lock another driver has. It is taken over if the lock is freed while the pool runs."""

    def poll(self, running: list[Running], waiting: list[PoolJob]) -> None:
        """Handle one round of the loop."""


class Pool:
    """Runs entries until none is left.

    Attributes:
        running, waiting: jobs by state.
        held_by_others: jobs that other drivers run; at the end, those that they still run.
        stopped_by: the signal that ended the pool.
    """

    def __init__(self, slots: Slots, listener: PoolListener) -> None:
        self.slots = slots
        self.listener = listener
        self.running: list[Running] = []
        self.waiting: list[PoolJob] = []
        self.held_by_others: list[PoolJob] = []
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
                    self.listener.poll(self.running, self.waiting)
                    time.sleep(POLL_SECONDS)
            finally:  # after an error in the pool: the jobs save and end by themselves
                for job in self.running:
                    job.stop()

    def add(self, entries: list[PoolJob]) -> None:
        """Queue jobs, the largest first."""
        self.waiting = sorted([*self.waiting, *entries], key=lambda entry: -entry.slots)

    def step(self) -> None:
        """Collect the jobs that have ended, and start those that fit."""
        self._obey()
        self._look()
        if self.held_by_others and time.monotonic() - self._looked > ELSEWHERE_SECONDS:
            self._freed()
        self._start_what_fits()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Start no more and end what runs."""
        self.waiting.clear()
        self._deadline = self._deadline or time.monotonic() + GRACE_SECONDS + END_SECONDS
        for job in self.running:
            job.stop(number)

    def _start_what_fits(self) -> None:
        in_use = {job.entry.lock.path for job in self.running}
        fits = self.slots.count
        for entry in list(self.waiting):
            if entry.slots > fits or entry.lock.path in in_use or entry not in self.waiting:
                continue
            if lease := self.slots.take(entry.slots):
                self._begin(entry, lease)
                in_use.add(entry.lock.path)
            else:
                fits = entry.slots - 1

    def _begin(self, entry: PoolJob, lease: SlotLease) -> None:
        self.waiting.remove(entry)
        if not entry.lock.acquire():
            lease.release()
            self.held_by_others.append(entry)
            self.listener.held_by_other(entry)
            return
        if not self.listener.wanted(entry):
            lease.release()
            entry.lock.release()
            return
        entry.attempt += 1
        job = self._start(entry, lease)
        self.running.append(job)
        self.listener.started(job)

    def _start(self, entry: PoolJob, lease: SlotLease) -> Running:
        entry.log.parent.mkdir(parents=True, exist_ok=True)
        settings = WorkerEnv(
            parent=os.getpid(),
            cores=self.slots.cores(lease.numbers),
            run_lock=entry.lock.descriptor,
            slot_locks=lease.descriptors,
        )
        with open(entry.log, "ab") as log:
            output = log.tell()
            process = subprocess.Popen(
                entry.command,
                env={
                    **os.environ,
                    **self.slots.visible_gpus(lease.numbers),
                    **settings.to_env(),
                    "PYTHONUNBUFFERED": "1",
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(entry.lock.descriptor, *lease.descriptors),
            )
        return Running(entry, lease, process, output)

    def _look(self) -> None:
        for job in list(self.running):
            code = job.process.poll()
            if code is None:
                if self._deadline and time.monotonic() > self._deadline:
                    job.stop(signal.SIGKILL)
                continue
            self.running.remove(job)
            job.entry.lock.release()
            job.lease.release()
            if self.listener.ended(job, code) and not self._deadline:
                self.add([job.entry])

    def _freed(self) -> bool:
        """Queue jobs whose locks other drivers have freed; return whether there are any."""
        self._looked = time.monotonic()
        freed = [entry for entry in self.held_by_others if not self._deadline and entry.lock.acquire()]
        for entry in freed:
            entry.lock.release()
            self.held_by_others.remove(entry)
        self.add(freed)
        return bool(freed)

    def _obey(self) -> None:
        """Handle the signals received since the last round."""
        while self._received:
            number = signal.Signals(self._received.pop(0))
            if self.stopped_by:  # drivers kill their ranks at a second signal; a driver that does not end is killed
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
