"""One training step, one evaluation, and the state that a checkpoint holds. Knows nothing of logs or files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from gpt import optim
from gpt.checkpoint import Arrays
from gpt.config import Config, DType, accumulate_steps, global_batch_size, micro_batch_size
from gpt.data.samples import Batch, Samples
from gpt.guard import require_finite
from gpt.model import GPT
from gpt.topology import Topology, derive_seed

PADDLE_DTYPE = {DType.fp32: "float32", DType.bf16: "bfloat16", DType.fp16: "float16"}
FIRST_LOSS_SCALE = 32768.0


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step. ``grad_norm`` is from before clipping."""

    loss: float
    grad_norm: float
    lr: float
    loss_scale: float | None


class Engine:
    """Model, optimizer and scaler of this rank.

    Args:
        config: of the job.
        topology: of this rank.
        train: False builds the model only, for evaluation and generation.
    """

    def __init__(self, config: Config, topology: Topology, *, train: bool = True) -> None:
        self.config = config
        self.topology = topology
        self.model = GPT(config, topology)
        self.parameters = self.model.logical_parameters()
        self.low_precision = config.precision.dtype is not DType.fp32
        self.optimizer: Any = None
        self.scaler: Any = None
        if train:
            self.model.initialise()
            self.optimizer = optim.build(self.parameters, config.optimizer, master_weights=self.low_precision)
        if self.low_precision:
            self._lower_precision()

    def _lower_precision(self) -> None:
        dtype = PADDLE_DTYPE[self.config.precision.dtype]
        if self.optimizer is None:
            self.model.to(dtype=dtype)
            return
        paddle.amp.decorate(self.model, self.optimizer, level="O2", dtype=dtype, master_weight=True)
        if self.config.precision.dtype is DType.fp16:
            self.scaler = paddle.amp.GradScaler(init_loss_scaling=FIRST_LOSS_SCALE)

    def _autocast(self) -> Any:
        dtype = PADDLE_DTYPE[self.config.precision.dtype] if self.low_precision else "float16"
        return paddle.amp.auto_cast(self.low_precision, level="O2", dtype=dtype)

    def step(self, number: int, samples: Samples) -> StepResult:
        """Forward and backward over all micro batches of step ``number`` (from 1), then one update.

        Raises:
            GuardError: loss or gradients are not finite; the weights are as before.
        """
        config = self.config
        lr = optim.lr_at(number, config.optimizer.lr, config.schedule)
        size = global_batch_size(config)
        batch = samples.batch((number - 1) * size, size)
        count = max(float(batch.mask_BT.sum()), 1.0)

        self.model.train()
        loss = 0.0
        micro = micro_batch_size(config)
        for i in range(accumulate_steps(config)):
            rows = slice(i * micro, (i + 1) * micro)
            paddle.seed(derive_seed(config.seed, "dropout", number, i))
            with self._autocast():
                part = self.model.loss(*_tensors(batch, rows), count)
            (self.scaler.scale(part) if self.scaler else part).backward()
            loss += part.item()

        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        parameters = list(self.parameters.values())
        norm = optim.global_norm(parameters)
        require_finite(number, loss, None if self.scaler else norm)
        optim.clip(parameters, norm, config.optimizer.clip_norm)
        self.optimizer.set_lr(lr)
        self._update()
        self.optimizer.clear_grad(set_to_zero=False)
        return StepResult(loss, norm, lr, self.scaler.get_init_loss_scaling() if self.scaler else None)

    def _update(self) -> None:
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()

    def evaluate(self, samples: Samples, batches: int) -> float:
        """Mean loss per counted token over the first ``batches`` global batches (at most one pass).

        Sums over all tokens, so a smaller last micro batch counts for what it is.
        """
        self.model.eval()
        total, counted = 0.0, 0.0
        micro = micro_batch_size(self.config)
        last = min(batches * global_batch_size(self.config), len(samples))
        for first in range(0, last, micro):
            batch = samples.batch(first, min(micro, last - first))
            count = float(batch.mask_BT.sum())
            if count:
                with paddle.no_grad(), self._autocast():
                    mean = self.model.loss(*_tensors(batch, slice(None)), count)
                total += mean.item() * count
                counted += count
        return total / max(counted, 1.0)

    def state(self) -> tuple[Arrays, Arrays, dict[str, Any]]:
        """Copies on the host: parameters in float32, optimizer slots, and the small rest."""
        master = self.optimizer.state_dict().get("master_weights", {})
        model = {name: master.get(p.name, p).numpy() for name, p in self.parameters.items()}
        slots = {k: v.numpy() for k, v in optim.state_of(self.optimizer, self.parameters).items()}
        scaler = self.scaler.state_dict() if self.scaler else None
        return model, slots, {"scaler": _plain(scaler)}

    def load(self, model: Arrays, slots: Arrays | None, rest: dict[str, Any]) -> None:
        """Take over a checkpoint; without ``slots`` the parameters only.

        Raises:
            ValueError: names or shapes are not those of this model.
        """
        if set(model) != set(self.parameters):
            odd = sorted(set(model) ^ set(self.parameters))
            raise ValueError(f"the checkpoint is of another model: {odd[:5]}")
        for name, p in self.parameters.items():
            if list(model[name].shape) != list(p.shape):
                raise ValueError(f"{name} has shape {list(model[name].shape)} there and {list(p.shape)} here")
            p.set_value(paddle.to_tensor(model[name]).astype(p.dtype))
        if slots is not None:
            optim.restore(self.optimizer, self.parameters, slots, model if self.low_precision else {})
        if self.scaler and rest.get("scaler"):
            self.scaler.load_state_dict(rest["scaler"])


def _tensors(batch: Batch, rows: slice) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    arrays = (batch.inputs_BT, batch.labels_BT, batch.mask_BT)
    inputs, labels, mask = (paddle.to_tensor(array[rows]) for array in arrays)
    return inputs, labels, mask


def _plain(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """A scaler's state as JSON holds it."""
    if state is None:
        return None
    return {k: v.item() if isinstance(v, paddle.Tensor | np.generic) else v for k, v in state.items()}
