"""Which token comes next, from one row of logits. V vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpt.data.tokens import Array
from gpt.text.request import Sampling


def adjusted(logits_V: Array, sampling: Sampling, seen: list[int], new: int, eot: int | None) -> Array:
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


def choose(logits_V: Array, sampling: Sampling, rng: np.random.Generator) -> int:
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
