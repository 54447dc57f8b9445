"""Where requests wait for the model: threads that speak HTTP bring them, the one that has the model takes them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from gpt.config.sampling import Sampling
from gpt.inference.types import Completion, TextDelta, TokenLogprobs


@dataclass(frozen=True)
class GenerationRequest:
    """What the model is to do.

    Attributes:
        prompts: token numbers.
        sampling: how to go on; None: not at all.
        scores: whether the log probabilities of the prompts and of what follows are wanted.
        pieces: whether parts are wanted as they come.
    """

    prompts: list[list[int]]
    sampling: Sampling | None
    scores: bool = False
    pieces: bool = False


class Started:
    """An order's turn has come."""


@dataclass(frozen=True)
class Finished:
    """Of each prompt its texts, and if wanted what the model thinks of the prompt followed by each."""

    texts: list[list[Completion]]
    scored: list[list[TokenLogprobs]] | None = None


class UnavailableError(Exception):
    """It cannot be done now; the message says why."""


class FailedError(Exception):
    """It could not be done; the reason is in the server's log."""


Event = TextDelta | Started | Finished | UnavailableError | FailedError


@dataclass(eq=False)
class QueuedRequest:
    """A wish, and whom to tell: ``tell`` may be called by any thread. ``gone``: nobody waits for it any more."""

    wish: GenerationRequest
    tell: Callable[[Event], None]
    gone: bool = False


class RequestQueue:
    """First come, first served. Every method may be called by any thread.

    Attributes:
        state: ``loading`` until ``open``, then ``ready``, and ``closing`` from ``close`` on.
        running: the order whose turn it is.

    Args:
        places: for orders that wait.
    """

    def __init__(self, places: int) -> None:
        self.state = "loading"
        self.running: QueuedRequest | None = None
        self._places = places
        self._waiting: deque[QueuedRequest] = deque()
        self._change = threading.Condition()

    @property
    def waiting(self) -> int:
        """Orders whose turn has not come."""
        return len(self._waiting)

    def open(self) -> None:
        """From now on orders are taken."""
        self.state = "ready"

    def put(self, order: QueuedRequest) -> None:
        """Let an order wait for its turn.

        Raises:
            UnavailableError: the model is not there (yet), or all places are taken.
        """
        with self._change:
            if self.state != "ready":
                raise UnavailableError(f"the server is {self.state}")
            if len(self._waiting) >= self._places:
                raise UnavailableError(f"{self._places} requests wait already (serve.queue)")
            self._waiting.append(order)
            self._change.notify()

    def leave(self, order: QueuedRequest) -> None:
        """Nobody wants it any more: it loses its place, or ends early if its turn has come."""
        with self._change:
            order.gone = True
            if order in self._waiting:
                self._waiting.remove(order)

    def take(self, seconds: float) -> QueuedRequest | None:
        """The next order, whose turn it is until ``done``; None if none comes in time."""
        with self._change:
            if not self._waiting:
                self._change.wait(seconds)
            self.running = self._waiting.popleft() if self._waiting else None
        if self.running:
            self.running.tell(Started())
        return self.running

    def done(self, news: Finished | UnavailableError | FailedError) -> None:
        """Tell whoever waits for the running order how it ended."""
        assert self.running
        self.running.tell(news)
        self.running = None

    def close(self) -> None:
        """Take no more orders; those that wait are told so."""
        with self._change:
            self.state = "closing"
            left, self._waiting = list(self._waiting), deque()
        for order in left:
            order.tell(UnavailableError("the server is closing"))
