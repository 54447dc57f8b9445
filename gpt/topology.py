"""Degrees to coordinates to layers. One device is the general case with all degrees 1.

This is the only module that may start Paddle's fleet, and the one place the model asks for its linears.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt.config import Config, Device, Parallel, UserError

if TYPE_CHECKING:
    import paddle


def unsupported(config: Config) -> list[str]:
    """What this version cannot run, in the words a user needs; a plan of it is still possible."""
    parallel = config.parallel
    degrees = {
        "dp_degree": parallel.dp_degree,
        "sharding_degree": parallel.sharding_degree,
        "mp_degree": parallel.mp_degree,
        "pp_degree": parallel.pp_degree,
    }
    above = " ".join(f"parallel.{name}={degree}" for name, degree in degrees.items() if degree > 1)
    if not above:
        return []
    return [f"{above}: this version trains on one rank; use parallel=single (task=plan works for every preset)"]


def derive_seed(*parts: Any) -> int:
    """A 31-bit seed that depends on all parts and on nothing else.

    Example:
        >>> derive_seed(1024, "dropout", 7) == derive_seed(1024, "dropout", 7)
        True
    """
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little") & 0x7FFFFFFF


def initial_value(seed: int, name: str, shape: list[int], std: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    """N(0, std^2) for a parameter's whole shape, from the seed and its logical name only.

    A rank that holds a slice takes it from the whole, so initial weights are the same on every topology.
    """
    key = hashlib.sha256(f"init {seed} {name}".encode()).digest()
    rng = np.random.Generator(np.random.SFC64(np.frombuffer(key, dtype=np.uint32)))
    values = rng.standard_normal(shape, dtype=np.float32)
    values *= np.float32(std)
    return values


@dataclass(frozen=True)
class Topology:
    """This rank's place. ``device`` is resolved: cpu or gpu."""

    parallel: Parallel
    device: Device
    rank: int = 0

    @classmethod
    def connect(cls, config: Config) -> Topology:
        """Choose the device and join the other ranks.

        Raises:
            UserError: the degrees need more ranks than this version runs.
        """
        import paddle

        problems = unsupported(config)
        if problems:
            raise UserError.of(problems)
        paddle.set_device(config.cluster.device.value)
        return cls(config.parallel, config.cluster.device)

    def column_linear(self, size_in: int, size_out: int) -> paddle.nn.Layer:
        """A linear whose output columns are shared out among the mp ranks; not yet initialised."""
        from gpt import ops

        return ops.Linear(size_in, size_out)

    def row_linear(self, size_in: int, size_out: int) -> paddle.nn.Layer:
        """A linear whose input rows are shared out among the mp ranks; not yet initialised."""
        from gpt import ops

        return ops.Linear(size_in, size_out)

    def embedding(self, rows: int, size: int) -> paddle.nn.Layer:
        """A table whose rows are shared out among the mp ranks; not yet initialised."""
        import paddle

        return paddle.nn.Embedding(rows, size, weight_attr=paddle.nn.initializer.Constant(0.0))
