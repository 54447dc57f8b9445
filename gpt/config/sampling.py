"""Sampling settings of one generation request, and their rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gpt.config.task_schemas import Generate


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when a text ends; the meaning of each is in ``gpt.config.task_schemas.Generate``."""

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
