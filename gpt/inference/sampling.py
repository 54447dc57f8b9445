"""Texts from logits by sampling; greedy is temperature 0. B rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpt.config.sampling import Sampling
from gpt.data.tokenizer import Encoder
from gpt.inference.decoder import Decoder
from gpt.inference.detokenizer import IncrementalDetokenizer
from gpt.inference.types import Completion, TextDelta
from gpt.utils.arrays import Array
from gpt.utils.rng import derive_seed

OnPiece = Callable[[TextDelta], None]
KeepGoing = Callable[[], bool]


@dataclass
class Sequence:
    """A text in the making; a random one draws from its own numbers, which do not depend on what else is written."""

    prompt: int
    number: int
    given: list[int]
    growing: IncrementalDetokenizer
    rng: np.random.Generator
    new: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None

    def add(self, token: int, logprob: float, sampling: Sampling, eot: int | None) -> TextDelta:
        """Put a token at the end, or end before it."""
        text = ""
        if token == eot:
            self.finish = "stop"
        else:
            self.new.append(token)
            self.logprobs.append(logprob)
            text = self.growing.add(token)
            if self.growing.stopped:
                self.finish = "stop"
            elif len(self.new) == sampling.max_new_tokens:
                self.finish = "length"
        if self.finish:
            text += self.growing.rest()
        return TextDelta(self.prompt, self.number, text, len(self.new), self.finish)

    def completion(self) -> Completion:
        """As it is."""
        return Completion(self.growing.text, self.new, self.finish or "stop", self.logprobs)


def sample(
    decoder: Decoder,
    prompts: list[list[int]],
    sampling: Sampling,
    encoder: Encoder,
    on_piece: OnPiece,
    keep_going: KeepGoing,
) -> list[list[Completion]]:
    """``sampling.num_return_sequences`` independent texts for each prompt."""
    count = sampling.num_return_sequences
    sequences = [
        Sequence(
            p,
            s,
            prompt,
            IncrementalDetokenizer(encoder, prompt, sampling.stop),
            np.random.default_rng(derive_seed(sampling.seed, "sample", s)),
        )
        for p, prompt in enumerate(prompts)
        for s in range(count)
    ]
    active = sequences
    decoder.take([sequence.prompt for sequence in sequences])
    while active and keep_going():
        chosen = _next_tokens(decoder.logits_BV, active, sampling, encoder.eot)
        for sequence, (token, logprob) in zip(active, chosen, strict=True):
            on_piece(sequence.add(token, logprob, sampling, encoder.eot))
        going = [i for i, sequence in enumerate(active) if sequence.finish is None]
        if len(going) < len(active):
            active = [active[i] for i in going]
            if active:
                decoder.take(going)
        if active:
            decoder.append([sequence.new[-1] for sequence in active])
    texts = [sequence.completion() for sequence in sequences]
    return [texts[i : i + count] for i in range(0, len(texts), count)]


def _next_tokens(
    logits_BV: Array, sequences: list[Sequence], sampling: Sampling, eot: int | None
) -> list[tuple[int, float]]:
    """A token for each sequence, and its log probability as the model has it."""
    logprobs_BV = log_probabilities(logits_BV)
    found = []
    for row, sequence in enumerate(sequences):
        logits_V = apply_penalties(logits_BV[row], sampling, sequence.given + sequence.new, len(sequence.new), eot)
        token = sample_token(logits_V, sampling, sequence.rng)
        found.append((token, float(logprobs_BV[row, token])))
    return found


# Which token comes next, from one row of logits. V vocabulary.


def apply_penalties(logits_V: Array, sampling: Sampling, seen: list[int], new: int, eot: int | None) -> Array:
    """Logits after the repetition penalty and the least length; the same array if there is nothing to do.

    Args:
        logits_V: float32.
        sampling: its penalty divides positive logits of tokens that were there and multiplies negative ones
            (Keskar et al., 2019).
        seen: the prompt and what followed.
        new: tokens that followed.
        eot: end-of-text, which cannot come before ``min_new_tokens``.
    """
    early = eot is not None and new < sampling.min_new_tokens
    if sampling.repetition_penalty == 1 and not early:
        return logits_V
    out: Array = logits_V.copy()
    if sampling.repetition_penalty != 1:
        index = np.unique(seen)
        some = out[index]
        out[index] = np.where(some > 0, some / sampling.repetition_penalty, some * sampling.repetition_penalty)
    if early:
        out[eot] = -np.inf
    return out


def sample_token(logits_V: Array, sampling: Sampling, rng: np.random.Generator) -> int:
    """Draw one token: temperature, then the top k (ties kept), then the smallest set of mass top p (Holtzman 2019).

    Args:
        logits_V: float32.
        sampling: temperature 0 takes the largest; top_k 0 and top_p 1 are off.
        rng: advanced by one draw, unless the largest is taken.
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    candidates = np.arange(len(logits_V))
    if 0 < sampling.top_k < len(logits_V):
        least = np.partition(logits_V, -sampling.top_k)[-sampling.top_k]
        candidates = np.flatnonzero(logits_V >= least)
    some: Any = logits_V[candidates].astype(np.float64)
    probability = np.exp((some - some.max()) / sampling.temperature)
    probability /= probability.sum()
    if sampling.top_p < 1:
        order = np.argsort(-probability, kind="stable")
        mass_before = np.cumsum(probability[order]) - probability[order]
        probability[order[mass_before >= sampling.top_p]] = 0.0
    mass = probability.cumsum()
    return int(candidates[np.searchsorted(mass, rng.random() * mass[-1], side="right")])


def log_probabilities(logits_BV: Array) -> Array:
    """Log of the softmax over the last axis."""
    shifted = logits_BV - logits_BV.max(-1, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found
