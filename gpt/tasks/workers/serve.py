"""Serve: answer completions over HTTP, one request at a time; all ranks do what the first takes from its desk."""

from __future__ import annotations

import itertools
import os
import time
import traceback
from collections.abc import Iterator
from signal import Signals as Signal
from typing import TYPE_CHECKING

from gpt.inference.generator import Generator
from gpt.inference.server import address
from gpt.inference.server.request_queue import (
    FailedError,
    Finished,
    GenerationRequest,
    QueuedRequest,
    RequestQueue,
    UnavailableError,
)
from gpt.inference.types import Completion, Scorer, TextDelta, TextGenerator
from gpt.parallel import pipeline_comm
from gpt.parallel.topology import Topology
from gpt.runs.run_dir import Job
from gpt.utils import heartbeat
from gpt.utils.console import say
from gpt.utils.signals import Signals

if TYPE_CHECKING:
    from gpt.inference.server.app import CompletionsApp, ServerThread


LOOK_SECONDS = 0.1  # for a signal, while nobody asks
IDLE_SECONDS = 5.0  # between signs of life to the other ranks, which wait in a collective
FINISH_SECONDS = 10.0  # for the request that a signal finds at work


def run(job: Job, signals: Signals) -> int:
    """Answer until a signal comes; returns the exit code."""
    heartbeat.beat(0, "connect")
    topology = Topology.initialize(job.config)
    if topology.rank > 0:
        return Loop(topology, Generator.of(job, topology), signals).run()
    desk = RequestQueue(job.config.serve.queue)
    service, front, url = _open(job, desk)  # which says from now on that the model is loading
    try:
        heartbeat.beat(0, "load")
        writer = Generator.of(job, topology)
        service.open(writer)
        say(f"ready: {url}/v1 has the model {job.config.model.name}; docs/serve.md shows how to ask, Ctrl-C ends it")
        code = Loop(topology, writer, signals, desk).run()
        say(f"stopped by {Signal(code - 128).name}")
        return code
    finally:
        desk.close()
        front.close()


def _open(job: Job, desk: RequestQueue) -> tuple[CompletionsApp, ServerThread, str]:
    """The routes, at their address, and what a client calls it."""
    from gpt.inference.server.app import CompletionsApp, ServerThread

    settings = job.config.serve
    key = os.environ[settings.api_key_env] if settings.api_key_env else None
    listener = address.bind(settings)
    if key is None and not address.is_loopback(listener):
        say(
            f"WARNING: serve.host={settings.host} lets other machines ask, and nothing keeps anyone out: "
            "serve.api_key_env=NAME makes them send the key that is in that environment variable"
        )
    service = CompletionsApp(settings, job.config.generate, job.config.model.name, desk, key)
    return service, ServerThread(service, listener), address.url(listener)


class Loop:
    """One rank at work. ``desk`` is the first rank's; the others are told what it takes."""

    def __init__(
        self, topology: Topology, writer: TextGenerator, signals: Signals, desk: RequestQueue | None = None
    ) -> None:
        self._topology = topology
        self._writer = writer
        self._signals = signals
        self._desk = desk
        self._latest = 0.0
        self._answered = 0

    def run(self) -> int:
        """Until a signal comes to the first rank; returns the exit code."""
        for turn in itertools.count(1):
            order = self._next(self._desk) if self._desk else None
            over = self._signals.exit_code if self._signals.received and order is None else 0
            message: tuple[GenerationRequest | None, int] = (order.wish if order else None, over)
            message = pipeline_comm.broadcast_object(self._topology, message)
            wish, code = message
            heartbeat.beat(turn, "answer" if wish else "idle")
            if code:
                return code
            if wish:
                self._answer(turn, wish, order)
        raise AssertionError

    def _next(self, desk: RequestQueue) -> QueuedRequest | None:
        """An order; None if there is a signal, or the other ranks must not wait any longer."""
        until = time.monotonic() + IDLE_SECONDS
        while not self._signals.received and time.monotonic() < until:
            if order := desk.take(LOOK_SECONDS):
                return order
        return None

    def _answer(self, turn: int, wish: GenerationRequest, order: QueuedRequest | None) -> None:
        began = time.perf_counter()
        news: Finished | UnavailableError | FailedError = FailedError()
        try:
            news = self._written(turn, wish, order)
        except Exception:
            if self._topology.hcg is not None:  # the other ranks may be somewhere else now
                raise
            traceback.print_exc()
        finally:
            if self._desk:
                self._desk.done(news)
        self._answered += 1
        if self._desk:
            read = sum(map(len, wish.prompts))
            say(f"request {self._answered}: {read:,} tokens in, {_end(news)}, {time.perf_counter() - began:.2f} s")

    def _written(self, turn: int, wish: GenerationRequest, order: QueuedRequest | None) -> Finished | UnavailableError:
        """All ranks together: the texts, and what the model thinks of them."""
        stopped = False

        def keep_going() -> bool:
            nonlocal stopped
            heartbeat.beat(turn, "token")
            stopped = self._topology.all_reduce_sum(float(order is not None and (order.gone or self._late())))[0] > 0
            return not stopped

        texts = [[Completion("", [], "length", [])] for _ in wish.prompts]
        if wish.sampling:
            on_piece = order.tell if order and wish.pieces else None
            texts = self._writer.write(wish.prompts, wish.sampling, on_piece, keep_going)
            if on_piece and wish.sampling.num_beams > 1:  # which come whole
                for piece in _pieces(texts):
                    on_piece(piece)
        if stopped:
            return UnavailableError("the client is gone" if order and order.gone else "the server is closing")
        if not wish.scores:
            return Finished(texts)
        assert isinstance(self._writer, Scorer)
        heartbeat.beat(turn, "score")
        rows = [p + text.tokens for p, mine in zip(wish.prompts, texts, strict=True) for text in mine]
        scored = iter(self._writer.score(rows))
        return Finished(texts, [[next(scored) for _ in mine] for mine in texts])

    def _late(self) -> bool:
        """Whether a signal came and the time to finish is over."""
        if self._signals.received and not self._latest and self._desk:
            self._desk.close()
            self._latest = time.monotonic() + FINISH_SECONDS
        return 0 < self._latest < time.monotonic()


def _pieces(texts: list[list[Completion]]) -> Iterator[TextDelta]:
    """Each text as one."""
    for prompt, mine in enumerate(texts):
        for sequence, text in enumerate(mine):
            yield TextDelta(prompt, sequence, text.text, len(text.tokens), text.finish)


def _end(news: Finished | UnavailableError | FailedError) -> str:
    """How a request ended, for the log."""
    if isinstance(news, Finished):
        return f"{sum(len(text.tokens) for texts in news.texts for text in texts):,} out"
    return "failed" if isinstance(news, FailedError) else str(news)
