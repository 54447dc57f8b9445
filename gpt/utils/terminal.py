"""The terminal (or pipe) of the user, which rank 0 of ``task=generate`` inherits: text as it comes, typed prompts."""

from __future__ import annotations

import os
import select
import sys


class Terminal:
    """Standard input and output of this process. Input is polled: a rank must also hear signals and the other ranks."""

    def __init__(self) -> None:
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
        self._typed = b""

    def show(self, text: str) -> None:
        """Print text without a line end."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def read_line(self, seconds: float) -> str | None:
        """Return the next line of input, or None if there is none within that time.

        Raises:
            EOFError: the input has ended.
        """
        while b"\n" not in self._typed:
            if not select.select([sys.stdin.fileno()], [], [], seconds)[0]:
                return None
            chunk = os.read(sys.stdin.fileno(), 1 << 16)
            if not chunk and not self._typed:
                raise EOFError
            self._typed += chunk or b"\n"
        line, _, self._typed = self._typed.partition(b"\n")
        return line.decode("utf-8", errors="replace")
