"""What is asked for and what comes back: plain values, no Paddle, so that a driver and a server know them too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from gpt.config_text import Generate


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when a text ends; the meaning of each is in ``gpt.config_text.Generate``."""

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    num_return_sequences: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    seed: int = 0

    @classmethod
    def of(cls, settings: Generate, seed: int) -> Sampling:
        """Those of a command."""
        return cls(
            max_new_tokens=settings.max_new_tokens,
            min_new_tokens=settings.min_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            repetition_penalty=settings.repetition_penalty,
            stop=tuple(settings.stop),
            num_return_sequences=settings.num_return_sequences,
            num_beams=settings.num_beams,
            length_penalty=settings.length_penalty,
            seed=seed,
        )

    def problems(self, called: Callable[[str], str] = "generate.{}".format) -> list[str]:
        """What is impossible, each a sentence; ``called`` says how a setting is called where it was asked for.

        Example:
            >>> Sampling(max_new_tokens=0).problems(str.upper)
            ['MAX_NEW_TOKENS=0: must be at least 1']
        """
        at_least = {"max_new_tokens": 1, "min_new_tokens": 0, "temperature": 0, "top_k": 0, "num_return_sequences": 1}
        at_least["num_beams"] = 1
        found = [
            f"{called(key)}={getattr(self, key)}: must be at least {low}"
            for key, low in at_least.items()
            if not low <= getattr(self, key) < float("inf")
        ]
        if not 0 < self.top_p <= 1:
            found.append(f"{called('top_p')}={self.top_p}: from more than 0 up to 1 (1: off)")
        if not 0.01 <= self.repetition_penalty <= 100:
            found.append(f"{called('repetition_penalty')}={self.repetition_penalty}: from 0.01 to 100 (1: off)")
        if not abs(self.length_penalty) <= 10:  # length^this is divided by
            found.append(f"{called('length_penalty')}={self.length_penalty}: from -10 to 10")
        if self.min_new_tokens > self.max_new_tokens:
            least, most = called("min_new_tokens"), called("max_new_tokens")
            found.append(f"{least}={self.min_new_tokens} is more than {most}={self.max_new_tokens}")
        if 1 < self.num_beams < self.num_return_sequences:
            found.append(
                f"{called('num_return_sequences')}={self.num_return_sequences} is more than "
                f"{called('num_beams')}={self.num_beams}: "
                "a beam search ends with as many texts as it has beams"
            )
        if any(not text for text in self.stop):
            found.append(f"{called('stop')} has an empty string, at which every text would end")
        return found


@dataclass(frozen=True)
class Piece:
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
class Scored:
    """What a model thinks of a text: an entry for every token but the first.

    Attributes:
        logprobs: log probability of the token after those before it.
        best: the most probable token there.
        best_logprobs: its log probability.
    """

    logprobs: list[float]
    best: list[int]
    best_logprobs: list[float]


class Writer(Protocol):
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
        on_piece: Callable[[Piece], None] | None = None,
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

    def score(self, texts: list[list[int]]) -> list[Scored]:
        """Of each text, which is like a prompt."""
