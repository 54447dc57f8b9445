"""One training step, one evaluation, and the state that a checkpoint holds. Knows nothing of logs or files."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import paddle

from gpt.config.derived import PADDLE_DTYPE, accumulate_steps, global_batch_size, micro_batch_size
from gpt.config.parameters import owners, parameter_shapes
from gpt.config.schema import Config, DType
from gpt.data.dataset import Batch, TokenDataset
from gpt.model.gpt import GPT, initialise
from gpt.parallel import gradients
from gpt.parallel.semi_auto import to_local
from gpt.parallel.topology import Topology
from gpt.parallel.zero import ZeroShards
from gpt.runs.checkpoint import reshard
from gpt.runs.checkpoint.reshard import ShardReader, TensorShards
from gpt.train import grad_norm, lr_scheduler
from gpt.train import optimizer as optimizers
from gpt.utils import heartbeat
from gpt.utils.signals import require_finite


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step. ``grad_norm`` is from before clipping; None: it overflowed, the update was left out."""

    loss: float
    grad_norm: float | None
    lr: float
    loss_scale: float | None


class Trainer:
    """Model, optimizer and scaler of this rank.

    Args:
        config: of the job.
        topology: of this rank.
        train: False builds the model only, for evaluation and generation.
    """

    def __init__(self, config: Config, topology: Topology, *, train: bool = True) -> None:
        self.config = config
        self.topology = topology
        self.training = train
        self.pipelined = topology.parallel.pp_degree > 1
        self.low_precision = config.precision.dtype is not DType.fp32
        self.keeps_master = self.low_precision or config.optimizer.offload
        sizes = {name: math.prod(shape) for name, shape in parameter_shapes(config).items()}
        self.shards = ZeroShards(topology, owners(sizes, topology.zero_degree))
        self.model: Any = self._build()
        self.parameters: dict[str, paddle.Tensor] = self.model.logical_parameters()
        self.owned = {name: p for name, p in self.parameters.items() if self.shards.is_mine(name)}
        self.resident = self.owned if self.shards.parameters_too else self.parameters  # between steps
        self.optimizer: Any = None
        self.loss_scale: optimizers.DynamicLossScaler | None = None
        self.lowered: StaticStep | None = None
        if train:
            self.optimizer = optimizers.build(
                self.owned, config.optimizer, master_weights=self.low_precision, placed=topology.placed
            )
            self.loss_scale = optimizers.DynamicLossScaler() if config.precision.dtype is DType.fp16 else None
            if topology.placed and config.parallel.static:
                from gpt.parallel.static_step import StaticStep

                micros, clip = accumulate_steps(config), config.optimizer.clip_norm
                self.lowered = StaticStep(self.model, topology.placed, self.optimizer, clip, micros)

    def _build(self) -> Any:
        if not self.pipelined:
            return GPT(self.config, self.topology, self._settle)
        from gpt.model.pipeline import Pipeline

        model = Pipeline(self.config, self.topology)
        self._prepare(model.logical_parameters(), model)
        return model

    def _settle(self, prefix: str, part: paddle.nn.Layer) -> None:
        """A part of the model has been made: its first values, its element type, and what need not stay here."""
        parameters = {f"{prefix}.{name}": p for name, p in part.named_parameters()}
        self._prepare(parameters, part)
        self.shards.settle(parameters, part, block=prefix.startswith("layers."))

    def _prepare(self, parameters: dict[str, paddle.Tensor], part: paddle.nn.Layer) -> None:
        if self.training:
            initialise(self.config, self.topology, parameters)
        if self.low_precision and self.training:
            paddle.amp.decorate(part, level="O2", dtype=PADDLE_DTYPE[self.config.precision.dtype])
        elif self.low_precision:
            part.to(dtype=PADDLE_DTYPE[self.config.precision.dtype])
        if self.topology.placed:
            self.topology.placed.settle(parameters, part)

    def _autocast(self) -> Any:
        dtype = PADDLE_DTYPE[self.config.precision.dtype] if self.low_precision else "float16"
        return paddle.amp.auto_cast(self.low_precision, level="O2", dtype=dtype)

    def step(self, number: int, samples: TokenDataset) -> StepResult:
        """Forward and backward over all micro batches of step ``number`` (from 1), then one update.

        Raises:
            GuardError: loss or gradients are not finite; the weights are as before.
        """
        config = self.config
        lr = lr_scheduler.lr_at(number, config.optimizer.lr, config.schedule)
        size = global_batch_size(config)
        share = size // self.topology.replicas
        batch = samples.batch((number - 1) * size + self.topology.replica * share, share)
        (count,) = self.topology.all_reduce_sum(self._said(float(batch.mask_BT.sum())))

        self.model.train()
        if self.lowered:
            return self._lowered_step(number, batch, max(count, 1.0), lr)
        heartbeat.beat(number, "forward and backward")
        with self.shards.outside_blocks():
            own_loss = self._accumulate(number, batch, max(count, 1.0))
        self.shards.finish(self.parameters)
        heartbeat.beat(number, "reduce and update")
        gradients.sum_gradients(self.topology, self.parameters)
        loss, norm = grad_norm.loss_and_norm(self.topology, self._said(own_loss), self.owned)
        scale = self.loss_scale.value if self.loss_scale else 1.0
        result = StepResult(loss, norm / scale if math.isfinite(norm) else None, lr, scale if self.loss_scale else None)
        require_finite(number, loss, None if self.loss_scale else norm)
        if result.grad_norm is not None:
            grad_norm.clip(list(self.owned.values()), result.grad_norm, config.optimizer.clip_norm, scale)
            self.optimizer.set_lr(lr)
            self._update()
        if self.loss_scale:
            self.loss_scale.after_step(result.grad_norm is not None)
        for p in self.parameters.values():
            p.clear_gradient(False)
        return result

    def _lowered_step(self, number: int, batch: Batch, count: float, lr: float) -> StepResult:
        """The same as one program, which leaves the update out itself if a gradient is not finite."""
        assert self.lowered
        heartbeat.beat(number, "run the program")
        self.topology.seed(self.config.seed, "dropout", number, self.topology.replica)
        inputs, labels, mask = _tensors(batch, slice(None))
        own_loss, norm = self.lowered.step((inputs, labels, mask / count), lr)
        (loss,) = self.topology.all_reduce_sum(self._said(own_loss))
        require_finite(number, loss, norm)
        return StepResult(loss, norm, lr, None)

    def _inputs(self, batch: Batch, rows: slice) -> tuple[paddle.Tensor, ...]:
        tensors = _tensors(batch, rows)
        return self.topology.placed.inputs(tensors) if self.topology.placed else tensors

    def _said(self, value: float) -> float:
        """What this rank gives to a sum over replicas."""
        return value if self.topology.reports_loss else 0.0

    def _accumulate(self, number: int, batch: Batch, count: float) -> float:
        """Forward and backward over this replica's micro batches, numbered as in the whole batch; their loss."""
        loss, micro, steps = 0.0, micro_batch_size(self.config), accumulate_steps(self.config)
        masks = (self.config.seed, "dropout", number)
        first = self.topology.replica * steps
        cuts = [slice(i * micro, (i + 1) * micro) for i in range(steps)]
        if self.pipelined:
            with self._autocast():
                micros = [_staged(batch, rows, count) for rows in cuts]
                return float(self.model.forward_backward(micros, (*masks, first), self.loss_scale))
        for i, rows in enumerate(cuts):
            self.topology.seed(*masks, first + i)
            with self._autocast():
                part = self.model.loss(*self._inputs(batch, rows), count)
            (self.loss_scale.scale(part) if self.loss_scale else part).backward()
            loss += to_local(part).item()
        return loss

    def _update(self) -> None:
        self.optimizer.step()
        if self.topology.zero_degree > 1 and not self.shards.parameters_too:
            gradients.broadcast_updated_parameters(self.topology, self.parameters, self.shards.owner)

    def evaluate(self, samples: TokenDataset, batches: int) -> float:
        """Mean loss per counted token over the first ``batches`` global batches (at most one pass).

        Sums over all tokens, so a smaller last micro batch counts for what it is.
        """
        self.model.eval()
        if self.lowered:
            self.lowered.show()
        with self.shards.outside_blocks():
            total, counted = self._sum_losses(samples, batches)
        total, counted = self.topology.all_reduce_sum(self._said(total), self._said(counted))
        return total / max(counted, 1.0)

    def _sum_losses(self, samples: TokenDataset, batches: int) -> tuple[float, float]:
        """Over this replica's share; and the counted tokens."""
        total, counted = 0.0, 0.0
        micro = micro_batch_size(self.config)
        last = min(batches * global_batch_size(self.config), len(samples))
        firsts = range(self.topology.replica * micro, last, micro * self.topology.replicas)
        together = accumulate_steps(self.config) if self.pipelined else 1
        for i in range(0, len(firsts), together):
            some = [samples.batch(first, min(micro, last - first)) for first in firsts[i : i + together]]
            total += self._staged_losses(some) if self.pipelined else self._losses(some[0])
            counted += sum(float(batch.mask_BT.sum()) for batch in some)
        rounds = -(-last // (micro * self.topology.replicas))
        if self.shards.parameters_too and len(firsts) < rounds:
            self._losses(samples.batch(0, 1).masked())  # the other replicas need this rank's parameters once more
        return total, counted

    def _losses(self, batch: Batch) -> float:
        """Sum over the counted tokens."""
        count = max(float(batch.mask_BT.sum()), 1.0)
        with paddle.no_grad(), self._autocast():
            mean = self.model.loss(*self._inputs(batch, slice(None)), count)
        return float(to_local(mean).item() * count)

    def _staged_losses(self, batches: list[Batch]) -> float:
        """The same through the pipeline, which wants a whole round of whole micro batches."""
        full = [batch.padded(micro_batch_size(self.config)) for batch in batches]
        full += [full[0].masked()] * (accumulate_steps(self.config) - len(full))
        with paddle.no_grad(), self._autocast():
            return float(self.model.evaluate([_staged(batch, slice(None), 1.0) for batch in full]))

    def _answers_for(self) -> dict[str, paddle.Tensor]:
        """Parameters of which this rank gives its slice to a checkpoint, with their slots; no other rank gives it."""
        if not self.topology.writes_checkpoint:
            return {}
        return {name: p for name, p in self.owned.items() if gradients.is_unique_parameter(self.topology, name, p)}

    def state(self) -> tuple[TensorShards, TensorShards, dict[str, Any]]:
        """What this rank gives to a checkpoint: parameters in float32, slots of the optimizer, and the small rest."""
        here, shapes = self._answers_for(), parameter_shapes(self.config)
        master, slots = self._optimizer_state()
        values = {name: master.get(name, p) for name, p in self.owned.items()}
        if self.topology.placed:  # all replicas put together what they share out, one writes it
            values, slots = ({k: self.topology.placed.together(v) for k, v in d.items()} for d in (values, slots))
        values = {name: value for name, value in values.items() if name in here}
        slots = {key: value for key, value in slots.items() if reshard.parameter_of(key, shapes) in here}
        rest = {"loss_scale": asdict(self.loss_scale) if self.loss_scale else None}
        model, optimizer = (reshard.local_shards(self.topology, arrays, here, shapes) for arrays in (values, slots))
        return model, optimizer, rest

    def _optimizer_state(self) -> tuple[dict[str, paddle.Tensor], dict[str, paddle.Tensor]]:
        if not self.lowered:
            return optimizers.state_of(self.optimizer, self.owned)
        self.lowered.show()
        return {}, optimizers.to_logical_names(self.lowered.slots(), self.owned)

    def load(self, model: ShardReader, slots: ShardReader | None, rest: dict[str, Any]) -> None:
        """Take over this rank's slices of a checkpoint; without ``slots`` the parameters only: moments start at 0.

        Raises:
            ValueError: names or shapes are not those of this model.
        """
        shapes = parameter_shapes(self.config)
        reshard.require_same(model.shapes, shapes)
        keep_master = self.training and self.keeps_master
        master = {}
        for name, p in self.resident.items():
            value = reshard.read_local_shard(self.topology, p, model, name)
            part = paddle.to_tensor(value).astype(p.dtype)
            self.topology.placed.put(p, part) if self.topology.placed else p.set_value(part)
            if keep_master and name in self.owned:
                master[name] = value
        if slots is not None or keep_master:
            own = (
                reshard.read_local_optimizer_state(self.topology, self.owned, slots, shapes)
                if slots is not None
                else {}
            )
            if self.lowered:
                self.lowered.restore(optimizers.to_paddle_names(own, self.owned))
            else:
                optimizers.restore(self.optimizer, self.owned, own, master, self.topology.placed)
        if self.loss_scale and rest.get("loss_scale"):
            self.loss_scale = optimizers.DynamicLossScaler(**rest["loss_scale"])


def _staged(batch: Batch, rows: slice, count: float) -> Any:
    """A micro batch as the pipeline's stages want it."""
    inputs, labels, mask = _tensors(batch, rows)
    return inputs, (labels, mask / count)


def _tensors(batch: Batch, rows: slice) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    arrays = (batch.inputs_BT, batch.labels_BT, batch.mask_BT)
    inputs, labels, mask = (paddle.to_tensor(array[rows]) for array in arrays)
    return inputs, labels, mask
