"""Run micro batches: one after the other through the whole model, or through the stages of a pipeline.

B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from gpt.config.derived import accumulate_steps, micro_batch_size
from gpt.data.dataset import Batch
from gpt.model.gpt import GPT
from gpt.model.token_scores import label_scores
from gpt.parallel.semi_auto import to_local
from gpt.utils.arrays import Array

Autocast = Callable[[], AbstractContextManager[Any]]
ShardInputs = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]


class SequentialRunner:
    """Run micro batches one after the other through a ``GPT``.

    Args:
        model: of this rank.
        autocast: makes the context of a forward pass.
        shard_inputs: applied to inputs, labels and mask of a batch.
    """

    round_size = 1  # batches of a full ``loss_sum`` or ``token_scores``

    def __init__(self, model: GPT, autocast: Autocast, shard_inputs: ShardInputs) -> None:
        self.model, self.autocast, self.shard_inputs = model, autocast, shard_inputs

    def forward_backward(self, batches: list[Batch], count: float, seed: tuple[Any, ...], scaler: Any) -> float:
        """Accumulate the gradients of a replica's micro batches; return the sum of their losses.

        Args:
            batches: ``accumulate_steps`` of them.
            count: counted tokens of the global batch, by which the losses are divided.
            seed: of the first micro batch's dropout masks; its last part counts up.
            scaler: of the loss, or None.
        """
        *parts, first = seed
        total = 0.0
        for i, batch in enumerate(batches):
            self.model.topology.seed(*parts, first + i)
            loss = self._loss(batch, count)
            (scaler.scale(loss) if scaler else loss).backward()
            total += to_local(loss).item()
        return total

    def loss_sum(self, batches: list[Batch]) -> float:
        """Return the sum of the cross entropies of all counted tokens of a round, without gradients."""
        (batch,) = batches
        count = max(float(batch.mask_BT.sum()), 1.0)
        with paddle.no_grad():
            return float(to_local(self._loss(batch, count)).item() * count)

    def token_scores(self, batches: list[Batch]) -> list[tuple[Array, Array]]:
        """Return of each batch the cross entropy of each label and whether it is the most probable token, BT each."""
        (batch,) = batches
        model, labels_BT = self.model, paddle.to_tensor(batch.labels_BT)
        with paddle.no_grad(), self.autocast():
            x_BTH = model.hidden(paddle.to_tensor(batch.inputs_BT))
            nll, is_top = label_scores(model.topology, x_BTH, model.word.weight, labels_BT, model.config.model.vocab)
        return [(nll.numpy(), is_top.numpy())]

    def _loss(self, batch: Batch, count: float) -> Tensor:
        with self.autocast():
            inputs, labels, mask = self.shard_inputs(to_tensors(batch))
            return self.model.loss(inputs, labels, mask, count)


class PipelineRunner:
    """Run micro batches through a ``gpt.model.pipeline.Pipeline``; methods as of ``SequentialRunner``.

    Only the last stage knows losses and scores; elsewhere losses are 0 and scores are missing.
    """

    def __init__(self, model: Any, autocast: Autocast) -> None:
        self.model, self.autocast = model, autocast
        self.round_size, self.rows = accumulate_steps(model.config), micro_batch_size(model.config)

    def forward_backward(self, batches: list[Batch], count: float, seed: tuple[Any, ...], scaler: Any) -> float:
        """Run the schedule's forward and backward passes."""
        with self.autocast():
            micros = [_micro_batch(batch, count) for batch in batches]
            return float(self.model.forward_backward(micros, seed, scaler))

    def loss_sum(self, batches: list[Batch]) -> float:
        """Run a round, filled up with batches in which no token counts."""
        full = [batch.padded(self.rows) for batch in batches]
        full += [full[0].masked()] * (self.round_size - len(full))
        with paddle.no_grad(), self.autocast():
            return float(self.model.evaluate([_micro_batch(batch, 1.0) for batch in full]))

    def token_scores(self, batches: list[Batch]) -> list[tuple[Array, Array]]:
        """Run a round, padded to one shape and filled up with copies."""
        B, T = (max(batch.inputs_BT.shape[axis] for batch in batches) for axis in (0, 1))
        pairs = []
        for batch in batches:
            pad = [(0, B - batch.inputs_BT.shape[0]), (0, T - batch.inputs_BT.shape[1])]
            pairs.append(tuple(paddle.to_tensor(np.pad(array, pad)) for array in (batch.inputs_BT, batch.labels_BT)))
        pairs += pairs[:1] * (self.round_size - len(pairs))
        with paddle.no_grad(), self.autocast():
            scores = self.model.scores(pairs)
        shapes = [batch.mask_BT.shape for batch in batches]
        return [(nll.numpy()[:B, :T], top.numpy()[:B, :T]) for (B, T), (nll, top) in zip(shapes, scores, strict=False)]


def _micro_batch(batch: Batch, count: float) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    inputs, labels, mask = to_tensors(batch)
    return inputs, (labels, mask / count)


def to_tensors(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, labels and mask as tensors."""
    inputs, labels, mask = (paddle.to_tensor(array) for array in (batch.inputs_BT, batch.labels_BT, batch.mask_BT))
    return inputs, labels, mask
