"""What is asked for and what comes back: plain values, no Paddle, so that a driver and a server know them too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from gpt.config.sampling import Sampling


@dataclass(frozen=True)
class TextDelta:
    """A part of a text as it comes.

    Attributes:
        prompt: number of the prompt.
        sequence: number among the texts of that prompt.
        text: new characters; nothing that a stop string or half a character could still take back.
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
        tokens: that were chosen, those of a stop string too, an end-of-text not.
        finish: ``stop`` (end-of-text or a stop string) or ``length``.
        logprobs: of each token, as the model has it (beam search: after the repetition penalty).
    """

    text: str
    tokens: list[int]
    finish: str
    logprobs: list[float]


@dataclass(frozen=True)
class TokenLogprobs:
    """What a model thinks of a text: an entry for every token but the first.

    Attributes:
        logprobs: log probability of the token after those before it.
        best: the most probable token there.
        best_logprobs: its log probability.
    """

    logprobs: list[float]
    best: list[int]
    best_logprobs: list[float]


class TextGenerator(Protocol):
    """A model at work. Prompts are token numbers below ``vocab``, none empty, none longer than ``positions``."""

    positions: int
    vocab: int

    def encode(self, text: str) -> list[int]:
        """Token numbers of a prompt; any thread may ask."""

    def decode(self, tokens: list[int]) -> str:
        """Their text; any thread may ask."""

    def write(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        on_piece: Callable[[TextDelta], None] | None = None,
        keep_going: Callable[[], bool] | None = None,
    ) -> list[list[Completion]]:
        """Continue each prompt ``sampling.num_return_sequences`` times.

        Args:
            prompts: continued side by side; each gets the text that it would get alone.
            sampling: without ``problems``.
            on_piece: told of parts as they come; not in a beam search.
            keep_going: asked before every token; when it says False, what is there is returned.
        """


@runtime_checkable
class Scorer(Protocol):
    """A writer that also says how probable texts are."""

    def score(self, texts: list[list[int]]) -> list[TokenLogprobs]:
        """Of each text, which is like a prompt."""
