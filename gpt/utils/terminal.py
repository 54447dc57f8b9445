"""A line between the driver and the worker of rank 0: text that appears as it comes, and prompts that are typed.

JSON, a message a line, over a pair of sockets. Messages to the driver: ``{"show": TEXT}``, ``{"ask": TEXT}``; from it,
one for each ``ask``: ``{"line": TEXT}``, or ``{"line": null}`` at the end of the input.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
from collections.abc import Callable
from typing import Any

VARIABLE = "GPT_TALK"


class TerminalHost:
    """The driver's end. ``descriptor`` is the worker's, to be handed over."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._socket, self._theirs = socket.socketpair()
        self._socket.setblocking(False)
        self._show = show
        self._received = b""
        self._typed = b""
        self._asked = False

    @property
    def descriptor(self) -> int:
        """Of the worker's end."""
        return self._theirs.fileno()

    @property
    def variables(self) -> dict[str, str]:
        """By which a worker finds its end."""
        return {VARIABLE: str(self.descriptor)}

    def pump(self) -> None:
        """Show what has come; pass on a line that has been typed, if one is wanted."""
        try:
            while chunk := self._socket.recv(1 << 16):
                self._received += chunk
        except BlockingIOError:
            pass
        *whole, self._received = self._received.split(b"\n")
        for message in map(json.loads, whole):
            self._show(message.get("show", message.get("ask")))
            self._asked = self._asked or "ask" in message
        if self._asked:
            self._type()

    def _type(self) -> None:
        """Read without a thread: one that waits for a terminal could not be ended."""
        end = False
        if b"\n" not in self._typed and select.select([sys.stdin.fileno()], [], [], 0)[0]:
            chunk = os.read(sys.stdin.fileno(), 1 << 16)
            self._typed, end = self._typed + chunk, not chunk
        line, newline, rest = self._typed.partition(b"\n")
        if newline or (end and line):
            self._typed = rest
            self._answer(line.decode("utf-8", errors="replace"))
        elif end:
            self._answer(None)

    def _answer(self, line: str | None) -> None:
        self._asked = False
        self._socket.sendall(json.dumps({"line": line}).encode() + b"\n")


class TerminalClient:
    """The worker's end."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._received = b""

    @classmethod
    def from_environment(cls) -> TerminalClient | None:
        """The end that was handed over, if any."""
        return cls(int(os.environ[VARIABLE])) if VARIABLE in os.environ else None

    def show(self, text: str) -> None:
        """Let it appear as it is."""
        self._send({"show": text})

    def ask(self, text: str) -> None:
        """Show ``text`` and let a line be typed, for ``answer``."""
        self._send({"ask": text})

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """The next ``{"line": ...}``, or None if there is none within that time."""
        while b"\n" not in self._received:
            if not select.select([self._socket], [], [], seconds)[0]:
                return None
            chunk = self._socket.recv(1 << 16)
            if not chunk:
                return {"line": None}  # the driver is gone
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _send(self, message: dict[str, str]) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")
