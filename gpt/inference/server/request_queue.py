"""Queue between the HTTP threads and the thread that runs the model."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from gpt.config.sampling import Sampling
from gpt.inference.types import Completion, TextDelta, TokenLogprobs


@dataclass(frozen=True)
class GenerationRequest:
    """Work for the model.

    Attributes:
        prompts: token numbers.
        sampling: of the continuation; None: no continuation.
        scores: whether to return log probabilities of prompts and continuations.
        pieces: whether to stream.
    """

    prompts: list[list[int]]
    sampling: Sampling | None
    scores: bool = False
    pieces: bool = False


class Started:
    """A request is being processed."""


@dataclass(frozen=True)
class Finished:
    """The texts of each prompt, and on request the log probabilities of the prompt followed by each."""

    texts: list[list[Completion]]
    scored: list[list[TokenLogprobs]] | None = None


class UnavailableError(Exception):
    """The request cannot be processed now; the message has the reason."""


class FailedError(Exception):
    """The request failed; the reason is in the server's log."""


Event = TextDelta | Started | Finished | UnavailableError | FailedError


@dataclass(eq=False)
class QueuedRequest:
    """A request and its thread-safe callback ``tell``. ``gone``: the client has disconnected."""

    wish: GenerationRequest
    tell: Callable[[Event], None]
    gone: bool = False


class RequestQueue:
    """First in, first out. Every method is thread-safe.

    Attributes:
        state: ``loading`` until ``open``, then ``ready``, and ``closing`` from ``close`` on.
        running: the request that is being processed.
    """

    def __init__(self, places: int) -> None:
        self.state = "loading"
        self.running: QueuedRequest | None = None
        self._places = places
        self._waiting: deque[QueuedRequest] = deque()
        self._change = threading.Condition()

    @property
    def waiting(self) -> int:
        """Return the number of waiting requests."""
        return len(self._waiting)

    def open(self) -> None:
        """Accept requests from now on."""
        self.state = "ready"

    def put(self, order: QueuedRequest) -> None:
        """Append a request.

        Raises:
            UnavailableError: the model is not loaded, or all places are taken.
        """
        with self._change:
            if self.state != "ready":
                raise UnavailableError(f"the server is {self.state}")
            if len(self._waiting) >= self._places:
                raise UnavailableError(f"{self._places} requests wait already (serve.queue)")
            self._waiting.append(order)
            self._change.notify()

    def leave(self, order: QueuedRequest) -> None:
        """Remove a request whose client has disconnected; if it is running, it ends early."""
        with self._change:
            order.gone = True
            if order in self._waiting:
                self._waiting.remove(order)

    def take(self, seconds: float) -> QueuedRequest | None:
        """Return the next request, which runs until ``done``; None if none arrives in time."""
        with self._change:
            if not self._waiting:
                self._change.wait(seconds)
            self.running = self._waiting.popleft() if self._waiting else None
        if self.running:
            self.running.tell(Started())
        return self.running

    def done(self, news: Finished | UnavailableError | FailedError) -> None:
        """Report how the running request ended."""
        assert self.running
        self.running.tell(news)
        self.running = None

    def close(self) -> None:
        """Accept no more requests and refuse those that wait."""
        with self._change:
            self.state = "closing"
            left, self._waiting = list(self._waiting), deque()
        for order in left:
            order.tell(UnavailableError("the server is closing"))
