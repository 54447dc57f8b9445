"""Training data: sample numbers to batches of tokens, the same on every topology."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from gpt.config.derived import global_batch_size
from gpt.config.schema import Config, Order
from gpt.config.task_schemas import Split
from gpt.data import sampler, token_files
from gpt.data.corpus import DatasetInfo
from gpt.data.token_files import TokenSet
from gpt.utils.arrays import Array
from gpt.utils.errors import UserError


class _Reader(Protocol):
    """Reader of one set's split."""

    @property
    def count(self) -> int:
        """Return the samples of one pass."""

    def read(self, i: int, into: Array) -> None:
        """Copy the L + 1 tokens of sample ``i`` (any number >= 0: sets repeat) to ``into``."""


@dataclass(frozen=True)
class _Windows:
    """``order=shuffle``, or in file order when ``seed`` is None."""

    ids: Array
    start: int
    count: int
    seq_len: int
    seed: int | None

    def read(self, i: int, into: Array) -> None:
        epoch, k = divmod(i, self.count)
        if self.seed is not None:
            k = int(sampler.permute(np.array(k), self.count, self.seed, epoch))
        begin = self.start + k * self.seq_len
        into[:] = self.ids[begin : begin + self.seq_len + 1]


@dataclass(frozen=True)
class _Megatron:
    """``order=megatron``: documents and samples shuffled by table."""

    token_set: TokenSet
    first_document: int
    index: sampler.MegatronIndex

    @property
    def count(self) -> int:
        return len(self.index.shuffle)

    def read(self, i: int, into: Array) -> None:
        row, offset = self.index.starts[self.index.shuffle[i % self.count]]
        filled = 0
        while filled < len(into):
            document = self.first_document + int(self.index.documents[row])
            ends = self.token_set.document_ends
            begin = (int(ends[document - 1]) if document else 0) + int(offset)
            piece = self.token_set.ids[begin : min(int(ends[document]), begin + len(into) - filled)]
            into[filled : filled + len(piece)] = piece
            filled += len(piece)
            row, offset = row + 1, 0


@dataclass(frozen=True)
class Batch:
    """int64 ``inputs_BT`` and ``labels_BT``; ``mask_BT`` (float32) is 1 where the loss counts."""

    inputs_BT: Array
    labels_BT: Array
    mask_BT: Array

    def rows(self, start: int, stop: int) -> Batch:
        """Return the rows from ``start`` to ``stop``."""
        return Batch(self.inputs_BT[start:stop], self.labels_BT[start:stop], self.mask_BT[start:stop])

    def masked(self) -> Batch:
        """Return the batch with an empty loss mask."""
        return Batch(self.inputs_BT, self.labels_BT, np.zeros_like(self.mask_BT))

    def padded(self, rows: int) -> Batch:
        """Return ``rows`` rows: copies of the first, masked, are added."""
        more = rows - len(self.inputs_BT)
        if not more:
            return self
        inputs, labels = (np.concatenate([a, np.repeat(a[:1], more, 0)]) for a in (self.inputs_BT, self.labels_BT))
        return Batch(inputs, labels, np.pad(self.mask_BT, ((0, more), (0, 0))))


class TokenDataset:
    """All samples of one split of one or several sets; not ``shuffled`` in file order, each once.

    Raises:
        UserError: there is no data, or the split holds too few tokens for one sample.
    """

    def __init__(self, config: Config, prepared: DatasetInfo, split: Split, *, shuffled: bool = True) -> None:
        if not prepared.parts:  # weights from elsewhere came without data
            raise UserError("this checkpoint came without data: name some with data=... data.path=...")
        self.seq_len = config.data.seq_len
        self.eot_id = prepared.eot_id if config.data.mask_eot else None
        self.repeat = global_batch_size(config) if config.data.overfit and split is Split.train else None
        self._readers = [
            _reader(config, prepared, token_files.load(part.path), split, shuffled) for part in prepared.parts
        ]
        self._pattern = sampler.interleave([part.weight for part in prepared.parts])
        # rank_before[k, r]: samples of set k among the first r of a period.
        one_hot = self._pattern[None, :] == np.arange(len(self._readers))[:, None]
        self._rank_before = np.cumsum(np.pad(one_hot, ((0, 0), (1, 0))), axis=1)

    def __len__(self) -> int:
        """Return the samples of one pass over every set."""
        return sum(reader.count for reader in self._readers)

    def epochs(self, samples: int) -> list[float]:
        """Return the passes over each set in the first ``samples`` samples."""
        period = len(self._pattern)
        return [
            (samples // period * int(ranks[-1]) + int(ranks[samples % period])) / reader.count
            for ranks, reader in zip(self._rank_before, self._readers, strict=True)
        ]

    def batch(self, first: int, count: int) -> Batch:
        """Return samples ``first`` to ``first`` + ``count``, a batch of shape [count, seq_len]."""
        rows = np.empty((count, self.seq_len + 1), dtype=np.int64)
        for row, number in enumerate(range(first, first + count)):
            i = number % self.repeat if self.repeat else number
            turn, r = divmod(i, len(self._pattern))
            k = int(self._pattern[r])
            ranks = self._rank_before[k]
            self._readers[k].read(turn * int(ranks[-1]) + int(ranks[r]), rows[row])
        inputs = np.ascontiguousarray(rows[:, :-1])
        mask = np.ones(inputs.shape, dtype=np.float32)
        if self.eot_id is not None:
            mask[inputs == self.eot_id] = 0.0
        return Batch(inputs, np.ascontiguousarray(rows[:, 1:]), mask)


def _reader(config: Config, prepared: DatasetInfo, token_set: TokenSet, split: Split, shuffled: bool) -> _Reader:
    bounds = token_files.split_bounds(token_set.documents, config.data.split)
    number = list(Split).index(split)
    first, last = bounds[number], bounds[number + 1]
    ends = token_set.document_ends
    start = int(ends[first - 1]) if first else 0
    stop = int(ends[last - 1]) if last > first else start
    count = sampler.windows(stop - start, config.data.seq_len)
    if count == 0:
        raise UserError(
            f"{token_set.prefix}: the {split.value} split has {last - first:,} of {token_set.documents:,} documents "
            f"and {stop - start:,} tokens, too few for one sample of data.seq_len={config.data.seq_len} + 1 tokens: "
            f"give more text, change data.split={config.data.split} or lower data.seq_len"
        )
    if not shuffled or config.data.order is Order.shuffle:
        return _Windows(token_set.ids, start, count, config.data.seq_len, config.seed if shuffled else None)
    batches = config.trainer.max_steps if split is Split.train else config.trainer.eval_batches
    lengths = np.diff(ends[first:last], prepend=start)
    index = sampler.cached_megatron_index(
        Path(config.data.cache_dir),
        token_set.fingerprint(),
        (first, last),
        lengths,
        config.data.seq_len,
        batches * global_batch_size(config),
        config.seed,
    )
    return _Megatron(token_set, first, index)
