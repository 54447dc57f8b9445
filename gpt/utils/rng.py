"""Seeds and initial values as pure functions of names."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from gpt.utils.arrays import Array


def derive_seed(*parts: Any) -> int:
    """A 31-bit seed that depends on all parts and on nothing else.

    Example:
        >>> derive_seed(1024, "dropout", 7) == derive_seed(1024, "dropout", 7)
        True
    """
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little") & 0x7FFFFFFF


def initial_value(seed: int, name: str, shape: list[int], std: float) -> Array:
    """N(0, std^2) for a parameter's whole shape, from the seed and its logical name only.

    A rank that holds a slice takes it from the whole, so initial weights are the same on every topology.
    """
    key = hashlib.sha256(f"init {seed} {name}".encode()).digest()
    rng = np.random.Generator(np.random.SFC64(np.frombuffer(key, dtype=np.uint32)))
    values = rng.standard_normal(shape, dtype=np.float32)
    values *= np.float32(std)
    return values
