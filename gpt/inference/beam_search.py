"""Beam search. B beams, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from gpt.config.sampling import Sampling
from gpt.data.tokenizer import Encoder
from gpt.inference.decoder import Decoder
from gpt.inference.detokenizer import IncrementalDetokenizer
from gpt.inference.sampling import apply_penalties, log_probabilities
from gpt.inference.types import Completion
from gpt.utils.arrays import Array


@dataclass(frozen=True)
class _Beam:
    """New tokens and their log probabilities; ``finish`` and ``score`` once it has ended."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish: str | None = None
    score: float = 0.0


@dataclass
class _Search:
    """The beams of one prompt."""

    prompt: list[int]
    sampling: Sampling
    encoder: Encoder
    beams: list[_Beam] = field(default_factory=lambda: [_Beam()])
    ended: list[_Beam] = field(default_factory=list)

    def advance(self, logits_BV: Array) -> list[int]:
        """Advance by one token and return the parent of each new beam; none when the search is done."""
        total_BV = np.stack([self._totals(row, beam) for row, beam in zip(logits_BV, self.beams, strict=True)])
        alive: list[tuple[int, _Beam]] = []
        for index in _largest(total_BV.ravel(), 2 * self.sampling.num_beams):  # as many again may end the text
            parent, token = divmod(int(index), total_BV.shape[1])
            total = float(total_BV[parent, token])
            if len(alive) == self.sampling.num_beams or not np.isfinite(total):
                break
            beam = self._extended(self.beams[parent], token, total)
            if beam.finish:
                self.ended.append(beam)
            else:
                alive.append((parent, beam))
        self.ended = sorted(self.ended, key=lambda beam: -beam.score)[: self.sampling.num_beams]
        if self._is_done([beam for _, beam in alive]):
            alive = []
        self.beams = [beam for _, beam in alive]
        return [parent for parent, _ in alive]

    def _totals(self, logits_V: Array, beam: _Beam) -> Array:
        """Return the log probability of the beam followed by each token."""
        seen = [*self.prompt, *beam.tokens]
        logits_V = apply_penalties(logits_V, self.sampling, seen, len(beam.tokens), self.encoder.eot)
        return log_probabilities(logits_V).astype(np.float64) + sum(beam.logprobs)

    def _extended(self, beam: _Beam, token: int, total: float) -> _Beam:
        logprobs = (*beam.logprobs, total - sum(beam.logprobs))
        if token == self.encoder.eot:
            return _Beam(beam.tokens, beam.logprobs, "stop", self._score(total, len(logprobs)))
        tokens = (*beam.tokens, token)
        stopped = bool(self.sampling.stop) and self._text(tokens).stopped
        full = len(tokens) == self.sampling.max_new_tokens
        finish = "stop" if stopped else "length" if full else None
        return _Beam(tokens, logprobs, finish, self._score(total, len(tokens)))

    def _score(self, total: float, length: int) -> float:
        return float(total / length**self.sampling.length_penalty)

    def _is_done(self, beams: list[_Beam]) -> bool:
        """Return whether no beam can still beat the ended ones: it only loses probability, and gains length at best."""
        if len(self.ended) < self.sampling.num_beams:
            return False
        longest = self.sampling.max_new_tokens if self.sampling.length_penalty > 0 else 0
        bounds = (self._score(sum(b.logprobs), max(longest, len(b.tokens))) for b in beams)
        return max(bounds, default=-np.inf) <= self.ended[-1].score

    def _text(self, tokens: tuple[int, ...]) -> IncrementalDetokenizer:
        detokenizer = IncrementalDetokenizer(self.encoder, self.prompt, self.sampling.stop)
        for token in tokens:
            detokenizer.add(token)
            if detokenizer.stopped:
                break
        return detokenizer

    def completions(self) -> list[Completion]:
        """Return the best, best first; if the search was interrupted, beams that have not ended too."""
        open_ones = [_Beam(b.tokens, b.logprobs, "length", b.score) for b in self.beams if b.tokens]
        best = sorted([*self.ended, *open_ones], key=lambda beam: -beam.score)[: self.sampling.num_return_sequences]
        return [Completion(self._text(b.tokens).text, list(b.tokens), str(b.finish), list(b.logprobs)) for b in best]


def _largest(values: Array, count: int) -> Array:
    """Return indices of the ``count`` largest values, largest first, the first of equals first."""
    candidates: Array = np.arange(len(values))
    if count < len(values):
        candidates = np.flatnonzero(values >= np.partition(values, -count)[-count])
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]


def beam_search(
    decoder: Decoder,
    prompts: list[list[int]],
    sampling: Sampling,
    encoder: Encoder,
    keep_going: Callable[[], bool],
) -> list[list[Completion]]:
    """Return the best ``num_return_sequences`` texts for each prompt, best first.

    Texts compare by the sum of their log probabilities over length^``length_penalty``; length counts new tokens and an
    end-of-text. A search is done when it has as many ended texts as beams and no beam can still beat the worst of them.
    """
    searches = [_Search(prompt, sampling, encoder) for prompt in prompts]
    active = list(searches)
    while active and keep_going():
        rows: list[int] = []
        first = 0
        for search in active:
            last = first + len(search.beams)
            rows += [first + parent for parent in search.advance(decoder.logits_BV[first:last])]
            first = last
        active = [search for search in active if search.beams]
        if active:
            decoder.select_rows(rows)
            decoder.step([beam.tokens[-1] for search in active for beam in search.beams])
    return [search.completions() for search in searches]
