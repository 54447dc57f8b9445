"""KV cache: keys and values of the positions so far, in memory that is allocated once.

B rows, N heads of this rank, S columns, D head size. All rows are as long as the longest: a shorter prompt has padding
at its left, so that new tokens of all rows go into the same column.
"""

from __future__ import annotations

import numpy as np
import paddle

from gpt.utils.arrays import Array


class Cache:
    """Keys and values of the blocks of one rank.

    Args:
        layers: blocks of this rank.
        shape: [B, N, S, D] of the keys, and of the values, of one block; S is the most that it can hold.
        dtype: of the activations.
        pads_B: columns at the left of each row that are padding.
    """

    def __init__(self, layers: int, shape: list[int], dtype: str, pads_B: Array) -> None:
        self.keys = [paddle.empty(shape, dtype) for _ in range(layers)]
        self.values = [paddle.empty(shape, dtype) for _ in range(layers)]
        self.columns = shape[2]
        self.pads_B = pads_B
        self.length = 0  # columns in use

    def positions(self, count: int) -> Array:
        """Return the positions [B, count] of the next columns, counted from each row's first token; padding is at 0."""
        columns_T = np.arange(self.length, self.length + count, dtype=np.int64)
        return np.maximum(columns_T[None] - self.pads_B[:, None], 0)

    def reorder(self, rows: Array) -> None:
        """Move row ``rows[i]`` to row i; there may be more or fewer rows than before."""
        if len(rows) == len(self.pads_B) and (rows == np.arange(len(rows))).all():
            return
        index = paddle.to_tensor(rows.astype(np.int64))
        for kept in (self.keys, self.values):
            for i, tensor in enumerate(kept):
                kept[i] = paddle.index_select(tensor, index, axis=0)
        self.pads_B = self.pads_B[rows]
