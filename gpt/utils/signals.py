"""What may end a run early, in one place: a signal, or numbers that are no longer numbers."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import time
from types import FrameType

DONE, FAILED, BAD_INPUT, GUARD = 0, 1, 2, 3
PR_SET_PDEATHSIG = 1
SAME_SECONDS = 2.0  # Slurm signals every process of a job, and a driver then passes the signal on


class GuardError(Exception):
    """The run must stop before its weights are harmed; the message says why and what to try."""


def die_with_parent(parent: int) -> None:
    """Ask Linux for SIGTERM if ``parent``, which started us, dies, even by SIGKILL; the run is then saved and ended."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(128 + signal.SIGTERM)  # it died before we asked


class Signals:
    """Turns SIGTERM and Ctrl-C into a flag that the loop reads between steps; a second one is obeyed at once, unless it
    is the first that came twice."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._since = 0.0
        self.listen()

    def listen(self) -> None:
        """Take the signals; again after an import that took them (Paddle's does)."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = signal.Signals(number), time.monotonic()
        elif number != self.received or time.monotonic() - self._since > SAME_SECONDS:
            sys.exit(128 + number)

    @property
    def exit_code(self) -> int:
        """143 or 130, by the shell's convention."""
        return 128 + (self.received or 0)


def require_finite(step: int, loss: float, grad_norm: float | None) -> None:
    """Stop before the optimizer sees a loss or gradient that is not finite.

    Args:
        step: being computed.
        loss: mean over the global batch.
        grad_norm: None if overflow is expected and handled (dynamic loss scaling).

    Raises:
        GuardError: with the step and what to try.
    """
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if value is not None and not math.isfinite(value):
            raise GuardError(
                f"the {name} is {value} at step {step:,}; the weights were not touched. "
                "Try a lower optimizer.lr, a longer schedule.warmup_steps, optimizer.clip_norm=1.0 or "
                "precision=fp32; the same command goes on from the last checkpoint"
            )
