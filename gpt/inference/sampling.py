"""Sample texts: penalties, temperature, top-k and top-p; greedy is temperature 0. B rows, V vocabulary."""

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


def apply_penalties(logits_V: Array, sampling: Sampling, seen: list[int], new: int, eot: int | None) -> Array:
    """Apply the repetition penalty and the minimal length; return the same array if there is nothing to do.

    The penalty divides positive logits of ``seen`` tokens and multiplies negative ones (Keskar et al., 2019). ``eot``
    cannot come before ``min_new_tokens``; ``new`` is the number of new tokens so far.
    """
    early = eot is not None and new < sampling.min_new_tokens
    if sampling.repetition_penalty == 1 and not early:
        return logits_V
    out: Array = logits_V.copy()
    if sampling.repetition_penalty != 1:
        index = np.unique(seen)
        logits = out[index]
        out[index] = np.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
    if early:
        out[eot] = -np.inf
    return out


def sample_token(logits_V: Array, sampling: Sampling, rng: np.random.Generator) -> int:
    """Draw one token: temperature, then the top k (ties kept), then the smallest set of mass top p (Holtzman 2019).

    Temperature 0 takes the largest and draws nothing; top_k 0 and top_p 1 are off.
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    candidates = np.arange(len(logits_V))
    if 0 < sampling.top_k < len(logits_V):
        least = np.partition(logits_V, -sampling.top_k)[-sampling.top_k]
        candidates = np.flatnonzero(logits_V >= least)
    logits: Any = logits_V[candidates].astype(np.float64)
    probability = np.exp((logits - logits.max()) / sampling.temperature)
    probability /= probability.sum()
    if sampling.top_p < 1:
        order = np.argsort(-probability, kind="stable")
        mass_before = np.cumsum(probability[order]) - probability[order]
        probability[order[mass_before >= sampling.top_p]] = 0.0
    mass = probability.cumsum()
    return int(candidates[np.searchsorted(mass, rng.random() * mass[-1], side="right")])


def log_probabilities(logits_BV: Array) -> Array:
    """Return the log of the softmax over the last axis."""
    shifted = logits_BV - logits_BV.max(-1, keepdims=True)
    logprobs: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logprobs


@dataclass
class Sequence:
    """An unfinished text with its own random generator, so that it does not depend on the other texts of the batch."""

    prompt: int
    number: int
    prompt_tokens: list[int]
    detokenizer: IncrementalDetokenizer
    rng: np.random.Generator
    new: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None

    def add(self, token: int, logprob: float, sampling: Sampling, eot: int | None) -> TextDelta:
        """Append a token, or end before it."""
        text = ""
        if token == eot:
            self.finish = "stop"
        else:
            self.new.append(token)
            self.logprobs.append(logprob)
            text = self.detokenizer.add(token)
            if self.detokenizer.stopped:
                self.finish = "stop"
            elif len(self.new) == sampling.max_new_tokens:
                self.finish = "length"
        if self.finish:
            text += self.detokenizer.flush()
        return TextDelta(self.prompt, self.number, text, len(self.new), self.finish)

    def completion(self) -> Completion:
        """Return the text so far."""
        return Completion(self.detokenizer.text, self.new, self.finish or "stop", self.logprobs)


def sample(
    decoder: Decoder,
    prompts: list[list[int]],
    sampling: Sampling,
    encoder: Encoder,
    on_piece: OnPiece,
    keep_going: KeepGoing,
) -> list[list[Completion]]:
    """Return ``sampling.num_return_sequences`` independent texts for each prompt."""
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
    decoder.select_rows([sequence.prompt for sequence in sequences])
    while active and keep_going():
        logprobs_BV = log_probabilities(decoder.logits_BV)
        for raw_V, logprobs_V, sequence in zip(decoder.logits_BV, logprobs_BV, active, strict=True):
            seen = sequence.prompt_tokens + sequence.new
            logits_V = apply_penalties(raw_V, sampling, seen, len(sequence.new), encoder.eot)
            token = sample_token(logits_V, sampling, sequence.rng)
            on_piece(sequence.add(token, float(logprobs_V[token]), sampling, encoder.eot))
        unfinished = [i for i, sequence in enumerate(active) if sequence.finish is None]
        if len(unfinished) < len(active):
            active = [active[i] for i in unfinished]
            if active:
                decoder.select_rows(unfinished)
        if active:
            decoder.step([sequence.new[-1] for sequence in active])
    texts = [sequence.completion() for sequence in sequences]
    return [texts[i : i + count] for i in range(0, len(texts), count)]
