"""Sums over everything that is measured: the same numbers on every rank, under every topology."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import paddle

from gpt.config.derived import accumulate_steps
from gpt.data.dataset import Batch
from gpt.data.eval_dataset import EvalRows
from gpt.model.token_scores import label_scores
from gpt.train.trainer import Trainer
from gpt.utils import heartbeat
from gpt.utils.arrays import Array
from gpt.utils.console import say

SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class RowScores:
    """Of some rows: sums of cross entropies (nats), counted tokens, and how many of those were the most probable."""

    nll_B: Array
    tokens_B: Array
    right_B: Array


@dataclass(frozen=True)
class EvalTotals:
    """Over all rows. ``rows_right`` counts rows in which every counted token was the most probable."""

    nll: float
    tokens: float
    right: float
    rows: float
    rows_right: float

    @property
    def loss(self) -> float:
        """Nats per counted token."""
        return self.nll / max(self.tokens, 1.0)

    def __add__(self, other: EvalTotals) -> EvalTotals:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return EvalTotals(*(one + another for one, another in pairs))


class Interrupted(Exception):
    """It was asked to stop."""


def never() -> bool:
    """Do not stop."""
    return False


def sums(
    engine: Trainer, rows: EvalRows, batch_size: int, most: int | None = None, stop: Callable[[], bool] = never
) -> EvalTotals:
    """Over the first ``most`` rows (None: all), shared out among the replicas; all ranks call it together.

    Raises:
        Interrupted: see ``scored``.
    """
    nll, tokens, right, count, whole = 0.0, 0.0, 0.0, 0, 0
    for _, found in scored(engine, rows, batch_size, most, stop):
        nll += float(found.nll_B.sum())
        tokens += float(found.tokens_B.sum())
        right += float(found.right_B.sum())
        count += len(found.nll_B)
        whole += int((found.right_B == found.tokens_B).sum())
    return EvalTotals(*engine.topology.all_reduce_sum(nll, tokens, right, count, whole))


def scored(
    engine: Trainer, rows: EvalRows, batch_size: int, most: int | None = None, stop: Callable[[], bool] = never
) -> Iterator[tuple[int, RowScores]]:
    """Row numbers and scores of this replica's batches; only the rank that speaks for a replica hears them.

    Raises:
        Interrupted: ``stop`` said so, which every rank asks before each round and which must say the same to all.
    """
    topology = engine.topology
    engine.model.eval()
    total = min(len(rows), most or len(rows))
    firsts = range(topology.replica * batch_size, total, batch_size * topology.replicas)
    together = accumulate_steps(engine.config) if engine.pipelined else 1
    rounds = -(-total // (batch_size * topology.replicas * together))
    began = said = time.monotonic()
    for i in range(0, rounds * together, together):
        if stop():
            raise Interrupted
        some = firsts[i : i + together]
        if not some:
            continue  # another replica has one batch more
        heartbeat.beat(i, "evaluate")
        batches = [rows.batch(first, min(batch_size, total - first)) for first in some]
        for first, batch, found in zip(some, batches, _scores(engine, batches, together), strict=True):
            if topology.reports_loss:
                yield first, _by_row(batch, *found)
        if topology.rank == 0 and time.monotonic() - said > SECONDS_BETWEEN_LINES:
            said, done = time.monotonic(), min(total, (i + together) * batch_size * topology.replicas)
            say(f"{done:,} of {total:,}, {(said - began) / done * (total - done):,.0f} s left")


def _by_row(batch: Batch, nll_BT: Array, right_BT: Array) -> RowScores:
    counts = batch.mask_BT > 0
    nll = np.where(counts, nll_BT, 0).sum(-1, dtype=np.float64)
    return RowScores(nll, counts.sum(-1), (counts & right_BT).sum(-1))


def _scores(engine: Trainer, batches: list[Batch], together: int) -> list[tuple[Array, Array]]:
    """Cross entropy and whether it was right, BT each, of each batch; of a pipeline only the last stage knows them."""
    tensors = [(paddle.to_tensor(b.inputs_BT), paddle.to_tensor(b.labels_BT)) for b in _alike(batches, together)]
    with paddle.no_grad(), engine._autocast():
        found = engine.model.scores(tensors) if engine.pipelined else [_of_model(engine, *pair) for pair in tensors]
    if not found:
        return [(np.empty(0), np.empty(0))] * len(batches)
    arrays = [(nll.numpy(), right.numpy()) for nll, right in found]
    shapes = [batch.mask_BT.shape for batch in batches]
    return [(nll[:B, :T], right[:B, :T]) for (B, T), (nll, right) in zip(shapes, arrays, strict=False)]


def _of_model(
    engine: Trainer, inputs_BT: paddle.Tensor, labels_BT: paddle.Tensor
) -> tuple[paddle.Tensor, paddle.Tensor]:
    x_BTH, vocab = engine.model.hidden(inputs_BT), engine.config.model.vocab
    return label_scores(engine.topology, x_BTH, engine.model.word.weight, labels_BT, vocab)


def _alike(batches: list[Batch], together: int) -> list[Batch]:
    """A pipeline wants a whole round of batches of one shape: rows, columns and batches that nobody reads are added."""
    if together == 1:
        return batches
    B, T = (max(batch.inputs_BT.shape[axis] for batch in batches) for axis in (0, 1))
    alike = []
    for batch in batches:
        more = [(0, B - batch.inputs_BT.shape[0]), (0, T - batch.inputs_BT.shape[1])]
        alike.append(Batch(*(np.pad(a, more) for a in (batch.inputs_BT, batch.labels_BT, batch.mask_BT))))
    return alike + alike[:1] * (together - len(alike))
