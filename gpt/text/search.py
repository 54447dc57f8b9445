"""Texts from logits by sampling; greedy is temperature 0. B rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from gpt.data.tokenizer import Encoder
from gpt.data.tokens import Array
from gpt.text.choice import adjusted, choose, log_probabilities
from gpt.text.decoder import Decoder
from gpt.text.growing import Growing
from gpt.text.request import Completion, Piece, Sampling
from gpt.topology import derive_seed

OnPiece = Callable[[Piece], None]
KeepGoing = Callable[[], bool]


@dataclass
class Sequence:
    """A text in the making; a random one draws from its own numbers, which do not depend on what else is written."""

    prompt: int
    number: int
    given: list[int]
    growing: Growing
    rng: np.random.Generator
    new: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None

    def add(self, token: int, logprob: float, sampling: Sampling, eot: int | None) -> Piece:
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
        return Piece(self.prompt, self.number, text, len(self.new), self.finish)

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
            Growing(encoder, prompt, sampling.stop),
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
        logits_V = adjusted(logits_BV[row], sampling, sequence.given + sequence.new, len(sequence.new), eot)
        token = choose(logits_V, sampling, sequence.rng)
        found.append((token, float(logprobs_BV[row, token])))
    return found
