"""Serve: answer completions over HTTP, one request at a time; all ranks do what the first takes from its desk."""

from __future__ import annotations

import itertools
import os
import time
import traceback
from collections.abc import Iterator
from signal import Signals as Signal
from typing import TYPE_CHECKING

from gpt import heartbeat, stages
from gpt.guard import Signals
from gpt.log import say
from gpt.runs import Job
from gpt.text import listen
from gpt.text.desk import BrokenError, Desk, Done, Order, UnavailableError, Wish
from gpt.text.request import Completion, Piece, Scorer, Writer
from gpt.text.writer import ModelWriter
from gpt.topology import Topology

if TYPE_CHECKING:
    from gpt.text.server import Front, Service

LOOK_SECONDS = 0.1  # for a signal, while nobody asks
IDLE_SECONDS = 5.0  # between signs of life to the other ranks, which wait in a collective
FINISH_SECONDS = 10.0  # for the request that a signal finds at work


def run(job: Job, signals: Signals) -> int:
    """Answer until a signal comes; returns the exit code."""
    heartbeat.beat(0, "connect")
    topology = Topology.connect(job.config)
    if topology.rank > 0:
        return Loop(topology, ModelWriter.of(job, topology), signals).run()
    desk = Desk(job.config.serve.queue)
    service, front, url = _open(job, desk)  # which says from now on that the model is loading
    try:
        heartbeat.beat(0, "load")
        writer = ModelWriter.of(job, topology)
        service.open(writer)
        say(f"ready: {url}/v1 has the model {job.config.model.name}; docs/serve.md shows how to ask, Ctrl-C ends it")
        code = Loop(topology, writer, signals, desk).run()
        say(f"stopped by {Signal(code - 128).name}")
        return code
    finally:
        desk.close()
        front.close()


def _open(job: Job, desk: Desk) -> tuple[Service, Front, str]:
    """The routes, at their address, and what a client calls it."""
    from gpt.text.server import Front, Service

    settings = job.config.serve
    key = os.environ[settings.api_key_env] if settings.api_key_env else None
    listener = listen.bind(settings)
    if key is None and not listen.is_loopback(listener):
        say(
            f"WARNING: serve.host={settings.host} lets other machines ask, and nothing keeps anyone out: "
            "serve.api_key_env=NAME makes them send the key that is in that environment variable"
        )
    service = Service(settings, job.config.generate, job.config.model.name, desk, key)
    return service, Front(service, listener), listen.url(listener)


class Loop:
    """One rank at work. ``desk`` is the first rank's; the others are told what it takes."""

    def __init__(self, topology: Topology, writer: Writer, signals: Signals, desk: Desk | None = None) -> None:
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
            said: tuple[Wish | None, int] = (order.wish if order else None, over)
            said = stages.from_first(self._topology, said)
            wish, code = said
            heartbeat.beat(turn, "answer" if wish else "idle")
            if code:
                return code
            if wish:
                self._answer(turn, wish, order)
        raise AssertionError

    def _next(self, desk: Desk) -> Order | None:
        """An order; None if there is a signal, or the other ranks must not wait any longer."""
        until = time.monotonic() + IDLE_SECONDS
        while not self._signals.received and time.monotonic() < until:
            if order := desk.take(LOOK_SECONDS):
                return order
        return None

    def _answer(self, turn: int, wish: Wish, order: Order | None) -> None:
        began = time.perf_counter()
        news: Done | UnavailableError | BrokenError = BrokenError()
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

    def _written(self, turn: int, wish: Wish, order: Order | None) -> Done | UnavailableError:
        """All ranks together: the texts, and what the model thinks of them."""
        stopped = False

        def keep_going() -> bool:
            nonlocal stopped
            heartbeat.beat(turn, "token")
            stopped = self._topology.totals(float(order is not None and (order.gone or self._late())))[0] > 0
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
            return Done(texts)
        assert isinstance(self._writer, Scorer)
        heartbeat.beat(turn, "score")
        rows = [p + text.tokens for p, mine in zip(wish.prompts, texts, strict=True) for text in mine]
        scored = iter(self._writer.score(rows))
        return Done(texts, [[next(scored) for _ in mine] for mine in texts])

    def _late(self) -> bool:
        """Whether a signal came and the time to finish is over."""
        if self._signals.received and not self._latest and self._desk:
            self._desk.close()
            self._latest = time.monotonic() + FINISH_SECONDS
        return 0 < self._latest < time.monotonic()


def _pieces(texts: list[list[Completion]]) -> Iterator[Piece]:
    """Each text as one."""
    for prompt, mine in enumerate(texts):
        for sequence, text in enumerate(mine):
            yield Piece(prompt, sequence, text.text, len(text.tokens), text.finish)


def _end(news: Done | UnavailableError | BrokenError) -> str:
    """How a request ended, for the log."""
    if isinstance(news, Done):
        return f"{sum(len(text.tokens) for texts in news.texts for text in texts):,} out"
    return "failed" if isinstance(news, BrokenError) else str(news)
