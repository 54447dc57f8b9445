"""A server for tests: the routes and the loop as they are, and a writer that needs no model."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from conftest import configured
from starlette.testclient import TestClient

from gpt.config.cluster import Device
from gpt.config.sampling import Sampling
from gpt.config.schema import Parallel
from gpt.config.task_schemas import Generate, Serve
from gpt.inference.server.app import CompletionsApp
from gpt.inference.server.request_queue import RequestQueue
from gpt.inference.types import Completion, TextDelta, TokenLogprobs
from gpt.parallel.topology import Topology
from gpt.tasks.workers.serve import Loop

MODEL = "parrot"
SECONDS = 20.0  # until a test gives up


class Parrot:
    """Tokens are bytes. It goes on with the bytes of the prompt, again and again; text number s is s bytes ahead.

    Attributes:
        asked: what it was called with.
        before: called before every token, with its number.
    """

    positions = 64
    vocab = 256

    def __init__(self) -> None:
        self.asked: list[tuple[list[list[int]], Sampling]] = []
        self.before: Callable[[int], None] = lambda number: None
        self.written = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def write(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        on_piece: Callable[[TextDelta], None] | None = None,
        keep_going: Callable[[], bool] | None = None,
    ) -> list[list[Completion]]:
        self.asked.append((prompts, sampling))
        self.written = 0
        while self.written < sampling.max_new_tokens and (keep_going is None or keep_going()):
            self.before(self.written)
            self.written += 1
            for p, prompt in enumerate(prompts):
                for s in range(sampling.num_return_sequences):
                    text = self.decode(self._tokens(prompt, s, self.written)[-1:])
                    if on_piece and sampling.num_beams == 1:
                        finish = "length" if self.written == sampling.max_new_tokens else None
                        on_piece(TextDelta(p, s, text, self.written, finish))
        return [[self._completion(prompt, s) for s in range(sampling.num_return_sequences)] for prompt in prompts]

    def _tokens(self, prompt: list[int], ahead: int, count: int) -> list[int]:
        return [prompt[(i + ahead) % len(prompt)] for i in range(count)]

    def _completion(self, prompt: list[int], ahead: int) -> Completion:
        tokens = self._tokens(prompt, ahead, self.written)
        return Completion(self.decode(tokens), tokens, "length", [0.0] * len(tokens))


class Judge(Parrot):
    """A parrot that also scores: an even token was the best, with -token/100; an odd one's neighbour was better."""

    def score(self, texts: list[list[int]]) -> list[TokenLogprobs]:
        rows = [text[1:] for text in texts]
        return [
            TokenLogprobs([-t / 100 for t in row], [t - t % 2 for t in row], [-(t - t % 2) / 100 for t in row])
            for row in rows
        ]


@dataclass
class Heard:
    """``gpt.utils.signals.Signals`` for a loop that is not in the main thread."""

    received: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        return 128 + (self.received or 0)


@dataclass
class Served:
    """A server at work."""

    writer: Parrot
    desk: RequestQueue
    service: CompletionsApp
    client: TestClient
    heard: Heard = field(default_factory=Heard)
    code: int | None = None

    def post(self, **body: Any) -> Any:
        """What a request gets."""
        return self.client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 6, **body})

    def choices(self, **body: Any) -> list[dict[str, Any]]:
        """Of a request that is answered."""
        response = self.post(**body)
        assert response.status_code == 200, response.text
        return list(response.json()["choices"])


def settings() -> tuple[Serve, Generate]:
    """Those of the command without any override."""
    config = configured(["task=serve"])
    return config.serve, config.generate


@contextmanager
def serving(
    writer: Parrot | None = None, *, limits: Serve | None = None, key: str | None = None, work: bool = True
) -> Iterator[Served]:
    """Routes over a desk, and unless ``work`` is False a loop that takes what is on it."""
    default, generate = settings()
    limits, writer = limits or default, writer or Judge()
    desk = RequestQueue(limits.queue)
    service = CompletionsApp(limits, generate, MODEL, desk, key)
    served = Served(writer, desk, service, TestClient(service.app, raise_server_exceptions=False))
    loop = Loop(Topology(Parallel(1, 1, 1, 1, 1, 1, False), Device.cpu), writer, served.heard, desk)  # type: ignore[arg-type]

    def run() -> None:
        served.code = loop.run()

    thread = threading.Thread(target=run, daemon=True)
    service.open(writer)
    if work:
        thread.start()
    try:
        yield served
    finally:
        served.heard.received = served.heard.received or signal.SIGTERM
        if work:
            thread.join(SECONDS)
            assert not thread.is_alive()
