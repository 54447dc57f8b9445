"""Devices or cores of this host, shared out among the jobs of one user: also of several grids at once.

A slot is a file that is locked (``flock``) for as long as its job lives, so no crash leaves one taken. Whoever takes
slots holds the *door* while doing so: two grids never end up with half of what each needs. For a large job the door
stays shut until enough slots have come free.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt.utils import machine
from gpt.utils.files import Lock


@dataclass
class SlotLease:
    """Slots that a job holds until ``release`` and the end of the last process that inherited ``descriptors``."""

    numbers: list[int]
    locks: list[Lock]

    @property
    def descriptors(self) -> tuple[int, ...]:
        """For the job's process to keep open: its slots stay taken if we are killed while it still saves."""
        return tuple(lock.descriptor for lock in self.locks)

    def release(self) -> None:
        """Give them back."""
        for lock in self.locks:
            lock.release()


class Slots:
    """Numbered slots. A slot is a GPU, or a core, or with more slots than cores a share of one.

    Args:
        count: how many there are.
        gpu: whether they are GPUs.
        folder: of the locks that several grids on this host share; None: in the folder for temporary files.
    """

    def __init__(self, count: int, *, gpu: bool, folder: Path | None = None) -> None:
        self.count = count
        self.gpu = gpu
        kind = "gpu" if gpu else "core"
        self._folder = (folder or Path(tempfile.gettempdir(), f"gpt-slots-{os.getuid()}")) / kind
        self._door = Lock(self._folder / "door.lock")
        self._kept = SlotLease([], [])

    def take(self, number: int, *, keep: bool = False) -> SlotLease | None:
        """Take so many, or none if they are not free, or somebody keeps them for a large job.

        Args:
            number: of slots.
            keep: if there are not enough yet, hold on to those that are free, and to the door, until the next call.
        """
        if not keep:
            self.let_go()
        if self._door.descriptor < 0 and not self._door.acquire():
            return None
        taken, self._kept = self._kept, SlotLease([], [])
        for slot in range(self.count):
            if len(taken.numbers) == number:
                break
            lock = Lock(self._folder / f"{slot}.lock")
            if slot not in taken.numbers and lock.acquire():
                taken.numbers.append(slot)
                taken.locks.append(lock)
        if len(taken.numbers) < number:
            self._kept = taken
            if not keep:
                self.let_go()
            return None
        self._count_start()
        self._door.release()
        return taken

    def let_go(self) -> None:
        """Keep nothing any more."""
        self._kept.release()
        self._kept = SlotLease([], [])
        self._door.release()

    def starts(self) -> int:
        """How many jobs have got slots on this host so far, of whichever grid: the length of a file, a byte each."""
        try:
            return (self._folder / "starts").stat().st_size
        except OSError:
            return 0

    def _count_start(self) -> None:
        with open(self._folder / "starts", "ab") as file:
            file.write(b".")

    def visible_gpus(self, slots: Sequence[int]) -> dict[str, str]:
        """Return the variable that limits a job to the GPUs of its slots; nothing where slots are cores."""
        if not self.gpu:
            return {}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(machine.gpus())]
        return {"CUDA_VISIBLE_DEVICES": ",".join(names[slot] for slot in slots)}

    def cores(self, slots: Sequence[int]) -> tuple[int, ...]:
        """Return the CPU cores of some slots, () where slots are GPUs.

        Each slot has equally many cores, so a job has the same number of threads when it is resumed on other slots.
        """
        cores = sorted(os.sched_getaffinity(0))
        each = len(cores) // self.count
        shares = [cores[s * each : (s + 1) * each] or [cores[s % len(cores)]] for s in slots] if not self.gpu else []
        return tuple(sorted(set().union(*shares)))
