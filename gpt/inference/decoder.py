"""Incremental decoding of a batch of rows. B rows, V vocabulary."""

from __future__ import annotations

import numpy as np
import paddle

from gpt.model.gpt import GPT
from gpt.model.kv_cache import Cache
from gpt.utils.arrays import Array

PREFILL_COLUMNS = 256  # at once: bounds the attention matrix of a long prompt


class Decoder:
    """Rows of tokens, and the logits of the next one, the same as of the row alone; at most ``new`` tokens follow.

    A row that has used up the model's positions continues from the last half of them.
    """

    def __init__(self, model: GPT, rows: list[list[int]], new: int) -> None:
        self._model = model
        self._rows = [list(row) for row in rows]
        self._left = new
        self._positions = model.config.model.positions
        self.logits_BV = self._prefill()

    def select_rows(self, rows: list[int]) -> None:
        """Replace row i by row ``rows[i]``; there may be more or fewer rows than before."""
        index = np.array(rows, dtype=np.int64)
        self._cache.reorder(index)
        self._rows = [list(self._rows[i]) for i in rows]
        self.logits_BV = self.logits_BV[index]

    def step(self, tokens: list[int]) -> None:
        """Append a token to each row and compute ``logits_BV`` of the next one."""
        for row, token in zip(self._rows, tokens, strict=True):
            row.append(token)
        self._left -= 1
        if max(map(len, self._rows)) > self._positions or self._cache.length == self._cache.columns:
            half = self._positions // 2 or 1
            self._rows = [row[-half:] if len(row) > self._positions else row for row in self._rows]
            self.logits_BV = self._prefill()
        else:
            self.logits_BV = self._logits(np.array(tokens, dtype=np.int64)[:, None])

    def _prefill(self) -> Array:
        """Run all rows from their beginning."""
        lengths = np.array([len(row) for row in self._rows])
        longest, shortest = int(lengths.max()), int(lengths.min())
        room = min(longest + max(self._left, 0), self._positions + longest - shortest)
        self._cache: Cache = self._model.new_cache(room, longest - lengths)
        tokens_BT = np.zeros((len(lengths), longest), dtype=np.int64)
        for number, row in enumerate(self._rows):
            tokens_BT[number, longest - len(row) :] = row
        *chunks, last = range(0, longest, PREFILL_COLUMNS)
        with paddle.no_grad():
            for first in chunks:
                self._model.forward_cached(paddle.to_tensor(tokens_BT[:, first : first + PREFILL_COLUMNS]), self._cache)
        return self._logits(tokens_BT[:, last:])

    def _logits(self, tokens_BT: Array) -> Array:
        with paddle.no_grad():
            logits_BV: Array = self._model.decode(paddle.to_tensor(tokens_BT), self._cache).astype("float32").numpy()
        return logits_BV
