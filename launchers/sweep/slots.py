"""Devices or cores of this host, divided among the jobs of one user, also of several grids at once.

A slot is a file that is locked (``flock``) for as long as its job lives, so no crash leaves one taken.
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
        """Descriptors that the job keeps open: its slots stay taken if its driver is killed while it still saves."""
        return tuple(lock.descriptor for lock in self.locks)

    def release(self) -> None:
        """Free the slots."""
        for lock in self.locks:
            lock.release()


class Slots:
    """Numbered slots. A slot is a GPU, or a core, or with more slots than cores a share of one.

    Args:
        count: number of slots.
        gpu: whether they are GPUs.
        folder: of the locks that all grids on this host share; None: in the folder for temporary files.
    """

    def __init__(self, count: int, *, gpu: bool, folder: Path | None = None) -> None:
        self.count = count
        self.gpu = gpu
        kind = "gpu" if gpu else "core"
        self._folder = (folder or Path(tempfile.gettempdir(), f"gpt-slots-{os.getuid()}")) / kind

    def take(self, number: int) -> SlotLease | None:
        """Lock ``number`` free slots; None, and nothing locked, if fewer are free."""
        lease = SlotLease([], [])
        for slot in range(self.count):
            lock = Lock(self._folder / f"{slot}.lock")
            if lock.acquire():
                lease.numbers.append(slot)
                lease.locks.append(lock)
                if len(lease.numbers) == number:
                    return lease
        lease.release()
        return None

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
