"""Matrices in eight bits: whole numbers from -127 to 127, and a float32 scale per output.

Symmetric, by the largest absolute value (as Jacob et al., 2018, for weights). Paddle 3.3 has no CPU kernel that
multiplies by such a matrix (docs/weights.md shows what it says), so they are
turned back into float32 where they are used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpt.data.tokens import Array
from gpt.slices import Stored
from gpt.whole import Slice

LARGEST = 127


@dataclass(frozen=True)
class Packed:
    """A matrix: int8 ``numbers`` and a float32 ``scale`` per index of ``axis``."""

    numbers: Array
    scale: Array
    axis: int

    def unpacked(self) -> Array:
        """Float32 again."""
        values: Array = self.numbers.astype(np.float32) * np.expand_dims(self.scale, 1 - self.axis)
        return values


def axis(name: str) -> int:
    """Along which axis the outputs of a parameter are: rows of a table are tokens or positions, columns else."""
    return 0 if name in ("word.weight", "position.weight") else 1


def pack(matrix: Array, along: int) -> Packed:
    """Nearest whole multiples of 1/127 of the largest value of each output.

    Example:
        >>> pack(np.array([[1.0, -3.0], [0.5, 0.3]], np.float32), along=1).numbers.tolist()
        [[127, -127], [64, 13]]
    """
    scale = np.abs(matrix).max(axis=1 - along).astype(np.float32) / LARGEST
    scale[scale == 0] = 1.0
    numbers = np.rint(matrix / np.expand_dims(scale, 1 - along)).astype(np.int8)
    return Packed(numbers, scale, along)


class Rounded(Stored):
    """A checkpoint's arrays as they are after packing: to measure what it costs."""

    def read(self, name: str, where: Slice) -> Array:
        """A slice, rounded together with the whole."""
        shape = self.index[name]["shape"]
        array = super().read(name, Slice(0, 0, shape[0]))
        if len(shape) == 2:
            array = pack(array, axis(name)).unpacked()
        return array[tuple(slice(begin, end) for begin, end in where.box(shape))]
