"""Evaluation over rows of tokens: the same figures on every rank, under every topology."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from gpt.data.dataset import Batch
from gpt.data.eval_dataset import EvalRows
from gpt.train.strategy import FleetStrategy
from gpt.utils import heartbeat
from gpt.utils.arrays import Array
from gpt.utils.console import say

SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class RowScores:
    """Of each row: sum of cross entropies (nats), counted tokens, and how many of those were the most probable."""

    nll_B: Array
    tokens_B: Array
    right_B: Array


@dataclass(frozen=True)
class EvalTotals:
    """Sums over all rows. ``rows_right`` counts rows in which every counted token was the most probable."""

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
    """The evaluation was stopped."""


class Evaluator:
    """Evaluates the model of a strategy; all ranks call its methods together, each replica reads its share of rows.

    ``limit`` is the number of rows, None: all. ``batch_size`` is the number of rows of one forward pass of a replica.
    """

    def __init__(self, strategy: FleetStrategy) -> None:
        self.strategy, self.topology = strategy, strategy.topology

    def mean_loss(self, rows: EvalRows, batch_size: int, limit: int | None = None) -> float:
        """Return the mean loss per counted token, by the model's own loss.

        Sums over all tokens, so a smaller last batch counts for what it is.
        """
        total, counted = 0.0, 0.0
        with self.strategy.evaluating() as runner:
            for _, batches in self._rounds(rows, batch_size, limit):
                total += runner.loss_sum(batches)
                counted += sum(float(batch.mask_BT.sum()) for batch in batches)
        mask = self.topology.mask_to_loss_rank
        total, counted = self.topology.all_reduce_sum(mask(total), mask(counted))
        return total / max(counted, 1.0)

    def totals(
        self, rows: EvalRows, batch_size: int, limit: int | None = None, stop: Callable[[], bool] = lambda: False
    ) -> EvalTotals:
        """Return the sums over the rows.

        Raises:
            Interrupted: see ``row_scores``.
        """
        sums = np.zeros(5)
        for _, scores in self.row_scores(rows, batch_size, limit, stop):
            per_row = scores.nll_B, scores.tokens_B, scores.right_B
            all_right = (scores.right_B == scores.tokens_B).sum()
            sums += [*(float(values.sum()) for values in per_row), len(scores.nll_B), all_right]
        return EvalTotals(*self.topology.all_reduce_sum(*sums.tolist()))

    def row_scores(
        self, rows: EvalRows, batch_size: int, limit: int | None = None, stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, RowScores]]:
        """Yield first row and scores of this replica's batches, on the rank that reports its replica's loss.

        Raises:
            Interrupted: ``stop`` returned True; each rank calls it before each round, with the same result on all.
        """
        total = min(len(rows), limit or len(rows))
        began = last_line = time.monotonic()
        done = 0
        with self.strategy.evaluating() as runner:
            for firsts, batches in self._rounds(rows, batch_size, limit):
                if stop():
                    raise Interrupted
                heartbeat.beat(done, "evaluate")
                scores = runner.token_scores(batches)
                if self.topology.reports_loss:
                    for first, batch, (nll_BT, top_BT) in zip(firsts, batches, scores, strict=False):
                        yield first, _by_row(batch, nll_BT, top_BT)
                done = min(total, done + batch_size * self.topology.replicas * runner.round_size)
                if self.topology.rank == 0 and time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                    last_line = time.monotonic()
                    say(f"{done:,} of {total:,}, {(last_line - began) / done * (total - done):,.0f} s left")

    def _rounds(self, rows: EvalRows, batch_size: int, limit: int | None) -> Iterator[tuple[range, list[Batch]]]:
        """Yield first rows and batches of this replica, as many at a time as a pipeline takes.

        Replicas have the same number of rounds, since they may need one another's parameters: one without rows left
        has a batch in which no token counts.
        """
        size, total = self.strategy.runner.round_size, min(len(rows), limit or len(rows))
        stride = batch_size * self.topology.replicas
        firsts = range(self.topology.replica * batch_size, total, stride)
        for i in range(0, -(-total // stride), size):
            own = firsts[i : i + size]
            batches = [rows.batch(first, min(batch_size, total - first)) for first in own]
            yield own, batches or [rows.batch(0, 1).masked()]


def _by_row(batch: Batch, nll_BT: Array, top_BT: Array) -> RowScores:
    counts = batch.mask_BT > 0
    nll = np.where(counts, nll_BT, 0).sum(-1, dtype=np.float64)
    return RowScores(nll, counts.sum(-1), (counts & top_BT).sum(-1))
