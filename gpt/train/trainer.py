"""One training step, one evaluation, and the state that a checkpoint holds. No logs and no files."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from gpt.config.derived import global_batch_size, micro_batch_size
from gpt.config.schema import Config, DType
from gpt.data.dataset import TokenDataset
from gpt.parallel.topology import Topology
from gpt.runs.checkpoint.reshard import ShardReader, TensorShards
from gpt.train import evaluator, lr_scheduler, strategy
from gpt.train.optimizer import DynamicLossScaler
from gpt.utils import heartbeat
from gpt.utils.signals import require_finite


@dataclass(frozen=True)
class StepResult:
    """Figures of an optimizer step. ``grad_norm`` is from before clipping; None: overflow, the update was skipped."""

    loss: float
    grad_norm: float | None
    lr: float
    loss_scale: float | None


class Trainer:
    """Model, optimizer and loss scaler of this rank.

    Args:
        config: of the job.
        topology: of this rank.
        train: False builds the model only, for evaluation and generation.
    """

    def __init__(self, config: Config, topology: Topology, *, train: bool = True) -> None:
        self.config, self.topology = config, topology
        self.strategy = strategy.build(config, topology, train=train)
        self.model, self.parameters = self.strategy.model, self.strategy.parameters
        self.evaluator = evaluator.Evaluator(self.strategy)
        self.loss_scale = DynamicLossScaler() if train and config.precision.dtype is DType.fp16 else None

    def step(self, number: int, samples: TokenDataset) -> StepResult:
        """Run forward and backward passes over the global batch of step ``number`` (from 1), then one update.

        Raises:
            GuardError: loss or gradients are not finite; the weights are as before.
        """
        config, topology = self.config, self.topology
        lr = lr_scheduler.lr_at(number, config.optimizer.lr, config.schedule)
        size = global_batch_size(config)
        rows = size // topology.replicas
        batch = samples.batch((number - 1) * size + topology.replica * rows, rows)
        (count,) = topology.all_reduce_sum(topology.mask_to_loss_rank(float(batch.mask_BT.sum())))

        heartbeat.beat(number, "forward and backward")
        self.strategy.set_lr(lr)
        own_loss = self.strategy.forward_backward(batch, max(count, 1.0), number, self.loss_scale)

        heartbeat.beat(number, "reduce and update")
        loss, norm = self.strategy.reduce(own_loss)
        require_finite(number, loss, None if self.loss_scale else norm)
        scale = self.loss_scale.value if self.loss_scale else 1.0
        finite = math.isfinite(norm)
        if finite:
            self.strategy.update(norm / scale, scale)
        if self.loss_scale:
            self.loss_scale.after_step(finite)
        self.strategy.zero_grad()
        return StepResult(loss, norm / scale if finite else None, lr, scale if self.loss_scale else None)

    def evaluate(self, samples: TokenDataset, batches: int) -> float:
        """Return the mean loss per counted token over the first ``batches`` global batches, at most one pass."""
        limit = batches * global_batch_size(self.config)
        return self.evaluator.mean_loss(samples, micro_batch_size(self.config), limit)

    def state(self) -> tuple[TensorShards, TensorShards, dict[str, Any]]:
        """Return this rank's shards of parameters and optimizer state for a checkpoint, and the small rest."""
        return *self.strategy.state(), {"loss_scale": asdict(self.loss_scale) if self.loss_scale else None}

    def load(self, model: ShardReader, slots: ShardReader | None, rest: dict[str, Any]) -> None:
        """Load a checkpoint; see ``FleetStrategy.load``."""
        self.strategy.load(model, slots)
        if self.loss_scale and rest.get("loss_scale"):
            self.loss_scale = DynamicLossScaler(**rest["loss_scale"])
