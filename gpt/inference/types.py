"""Values and protocols of text generation; no Paddle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from gpt.config.sampling import Sampling


@dataclass(frozen=True)
class TextDelta:
    """A part of a text, streamed.

    Attributes:
        prompt: number of the prompt.
        sequence: number among the texts of that prompt.
        text: new characters, which no stop string or half a character can change any more.
        tokens: so far.
        finish: with the last piece: ``stop`` (end-of-text or a stop string) or ``length``.
    """

    prompt: int
    sequence: int
    text: str
    tokens: int
    finish: str | None = None


@dataclass(frozen=True)
class Completion:
    """A finished text.

    Attributes:
        text: without end-of-text and without the stop string.
        tokens: with those of a stop string, without an end-of-text.
        finish: ``stop`` (end-of-text or a stop string) or ``length``.
        logprobs: of each token, as the model has it (beam search: after the repetition penalty).
    """

    text: str
    tokens: list[int]
    finish: str
    logprobs: list[float]


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities of a text: an entry for every token but the first.

    Attributes:
        logprobs: log probability of the token after those before it.
        best: the most probable token in its place.
        best_logprobs: its log probability.
    """

    logprobs: list[float]
    best: list[int]
    best_logprobs: list[float]


class TextGenerator(Protocol):
    """A model that continues texts. Prompts are token numbers below ``vocab``, at least 1, at most ``positions``."""

    positions: int
    vocab: int

    def encode(self, text: str) -> list[int]:
        """Return token numbers of a prompt; thread-safe."""

    def decode(self, tokens: list[int]) -> str:
        """Return the text of token numbers; thread-safe."""

    def write(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        on_piece: Callable[[TextDelta], None] | None = None,
        keep_going: Callable[[], bool] | None = None,
    ) -> list[list[Completion]]:
        """Continue each prompt ``sampling.num_return_sequences`` times.

        Args:
            prompts: one batch; each gets the text that it would get alone.
            sampling: without ``problems``.
            on_piece: takes parts as they are generated; not in a beam search.
            keep_going: called before every token; when it returns False, the texts so far are returned.
        """


@runtime_checkable
class Scorer(Protocol):
    """A generator that also returns log probabilities."""

    def score(self, texts: list[list[int]]) -> list[TokenLogprobs]:
        """Score each text, which is like a prompt."""
