"""Devices or cores of this host, shared out among the jobs of one user: also of several grids at once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt.files import Lock
from launchers import host


@dataclass
class Taken:
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

    def take(self, number: int) -> Taken | None:
        """Take so many, or none if they are not free."""
        taken = Taken([], [])
        for slot in range(self.count):
            lock = Lock(self._folder / f"{slot}.lock")
            if lock.acquire():
                taken.numbers.append(slot)
                taken.locks.append(lock)
                if len(taken.numbers) == number:
                    return taken
        taken.release()
        return None

    def environment(self, numbers: Sequence[int]) -> dict[str, str]:
        """What keeps a job to its slots: the GPUs it sees, or the cores it may use."""
        if self.gpu:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = visible.split(",") if visible else [str(i) for i in range(host.gpus())]
            return {"CUDA_VISIBLE_DEVICES": ",".join(names[slot] for slot in numbers)}
        return {"GPT_CORES": ",".join(map(str, sorted(set().union(*(self._cores(slot) for slot in numbers)))))}

    def _cores(self, slot: int) -> set[int]:
        cores = sorted(os.sched_getaffinity(0))
        each = len(cores) // self.count
        return set(cores[slot * each : (slot + 1) * each]) if each else {cores[slot % len(cores)]}
