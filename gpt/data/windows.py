"""Rows of tokens to be scored, and which of their tokens count: overlapping windows, and contexts with an ending.

``Batch.mask_BT`` says what counts, as in training. Rows that end early are filled up at the end with token 0, which
nothing before it sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gpt.config import UserError
from gpt.data import tokens
from gpt.data.samples import Batch
from gpt.data.tokens import Array, TokenSet


class Rows(Protocol):
    """What can be scored."""

    def __len__(self) -> int:
        """How many rows there are."""

    def batch(self, first: int, count: int) -> Batch:
        """Rows ``first`` to ``first`` + ``count``."""


@dataclass(frozen=True)
class Windows:
    """Windows over a row of tokens, of which every token but the first counts in exactly one.

    The first window counts whole; each later one begins ``stride`` tokens after the one before it, and only the
    tokens that are new in it count, so that they have ``length`` - ``stride`` tokens or more before them.

    Attributes:
        ids: tokens, of which the windows see those from ``start`` up to ``stop``.
        start: of the row.
        stop: of the row.
        length: tokens that the model sees at once.
        stride: 1 to ``length``; ``length``: side by side.
        eot_id: what follows it does not count, since it is another document; None: all count.

    Example:
        >>> row = Windows(np.arange(8), 0, 8, length=4, stride=2, eot_id=None).batch(0, 3)
        >>> [labels[mask > 0].tolist() for labels, mask in zip(row.labels_BT, row.mask_BT)]
        [[1, 2, 3, 4], [5, 6], [7]]
    """

    ids: Array
    start: int
    stop: int
    length: int
    stride: int
    eot_id: int | None

    def __len__(self) -> int:
        """How many windows there are."""
        beyond = self.stop - self.start - 1 - self.length
        return 0 if self.stop - self.start < 2 else 1 + max(0, -(-beyond // self.stride))

    def batch(self, first: int, count: int) -> Batch:
        """See ``Rows``."""
        rows, counts_from = [], []
        for number in range(first, first + count):
            begin = self.start + number * self.stride
            rows.append(self.ids[begin : min(begin + self.length + 1, self.stop)])
            counts_from.append(self.length - self.stride if number else 0)
        return _filled(rows, counts_from, self.eot_id)

    def counted(self) -> int:
        """Tokens that count in all windows."""
        inputs = self.ids[self.start : self.stop - 1]
        return len(inputs) - (int((inputs == self.eot_id).sum()) if self.eot_id is not None else 0)


class Endings:
    """Contexts with an ending each, which alone counts; the longest first, so that a batch has rows of similar length.

    Args:
        contexts: tokens, at least one each.
        endings: tokens; of more than ``length`` the last ones count.
        length: tokens that the model sees at once; of what is too long the beginning is cut off.
    """

    def __init__(self, contexts: Sequence[Array], endings: Sequence[Array], length: int) -> None:
        pairs = list(zip(contexts, endings, strict=True))
        self.order = sorted(range(len(pairs)), key=lambda i: -sum(len(part) for part in pairs[i]))
        self.cut = sum(len(context) + len(ending) > length + 1 for context, ending in pairs)
        self._rows = [np.concatenate(pairs[i])[-length - 1 :] for i in self.order]
        self._counts_from = [
            max(0, len(row) - 1 - len(endings[i])) for row, i in zip(self._rows, self.order, strict=True)
        ]

    def __len__(self) -> int:
        """How many there are."""
        return len(self._rows)

    def batch(self, first: int, count: int) -> Batch:
        """See ``Rows``."""
        return _filled(self._rows[first : first + count], self._counts_from[first : first + count], None)


def _filled(rows: list[Array], counts_from: list[int], eot_id: int | None) -> Batch:
    shape = (len(rows), max(len(row) for row in rows) - 1)
    inputs, labels = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.float32)
    for i, (row, first) in enumerate(zip(rows, counts_from, strict=True)):
        last = len(row) - 1
        inputs[i, :last], labels[i, :last] = row[:-1], row[1:]
        mask[i, first:last] = 1.0
    if eot_id is not None:
        mask[inputs == eot_id] = 0.0
    return Batch(inputs, labels, mask)


def of_split(
    token_set: TokenSet, shares: list[float], number: int, length: int, stride: int, eot: int | None
) -> Windows:
    """Windows over one split of a token set.

    Args:
        token_set: the whole set.
        shares: of its splits (``data.split``).
        number: of the split.
        length: see ``Windows``.
        stride: see ``Windows``.
        eot: see ``Windows``.

    Raises:
        UserError: the split has nothing to predict.
    """
    bounds = tokens.split_bounds(token_set.documents, shares)
    ends = token_set.document_ends
    start, stop = (int(ends[bounds[number + i] - 1]) if bounds[number + i] else 0 for i in (0, 1))
    if stop - start < 2:
        raise UserError(
            f"{token_set.prefix}: the {('train', 'val', 'test')[number]} split has {max(stop - start, 0)} tokens, "
            f"nothing to predict: give more text or change data.split={shares}"
        )
    return Windows(token_set.ids, start, stop, length, stride, eot)
