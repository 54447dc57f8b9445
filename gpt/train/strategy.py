"""How a model is built, stepped, saved and loaded under one way to parallelise it.

``FleetStrategy`` is one process, or Fleet's layers with ZeRO; ``SemiAutoStrategy`` is Paddle's semi-auto engine, and
``StaticStrategy`` its step as one static program. Everything else asks the object, never which one it is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import paddle
from paddle import Tensor, nn

from gpt.config.cluster import Device
from gpt.config.derived import PADDLE_DTYPE, accumulate_steps, micro_batch_size
from gpt.config.parameters import owners, parameter_shapes
from gpt.config.schema import Config, DType, EngineKind
from gpt.data.dataset import Batch
from gpt.model.gpt import GPT, initialise
from gpt.parallel import gradients
from gpt.parallel.semi_auto import MeshPlacement
from gpt.parallel.topology import Topology
from gpt.parallel.zero import ZeroShards
from gpt.runs.checkpoint import reshard
from gpt.runs.checkpoint.reshard import ShardReader, TensorShards
from gpt.train import grad_norm
from gpt.train import optimizer as optimizers
from gpt.train.micro_batches import PipelineRunner, SequentialRunner, to_tensors
from gpt.utils.arrays import Array

Tensors = dict[str, Tensor]


def build(config: Config, topology: Topology, *, train: bool) -> FleetStrategy:
    """Build model and optimizer of this rank under the strategy that the configuration names."""
    if config.parallel.engine is EngineKind.fleet:
        return FleetStrategy(config, topology, train=train)
    return (StaticStrategy if config.parallel.static else SemiAutoStrategy)(config, topology, train=train)


class FleetStrategy:
    """One process, or ranks under Fleet: data, tensor and pipeline parallel, ZeRO-1 to ZeRO-3.

    Args:
        config: of the job.
        topology: of this rank.
        train: False builds the model only, for evaluation and generation.

    Attributes:
        parameters: of this rank, by logical name.
        owned: those that this rank updates.
        runner: of micro batches.
    """

    def __init__(self, config: Config, topology: Topology, *, train: bool) -> None:
        self.config, self.topology, self.training = config, topology, train
        self._low_precision = config.precision.dtype is not DType.fp32
        sizes = {name: math.prod(shape) for name, shape in parameter_shapes(config).items()}
        self.zero = ZeroShards(topology, owners(sizes, topology.zero_degree))
        self.runner: SequentialRunner | PipelineRunner = self._build()
        self.model: Any = self.runner.model
        self.parameters: Tensors = self.model.logical_parameters()
        self.owned = {name: p for name, p in self.parameters.items() if self.zero.is_owned(name)}
        self.optimizer: Any = self._build_optimizer() if train else None

    def _build(self) -> SequentialRunner | PipelineRunner:
        if self.topology.parallel.pp_degree == 1:
            model = GPT(self.config, self.topology, self._on_built)
            return SequentialRunner(model, self._autocast, self._shard_inputs)
        from gpt.model.pipeline import Pipeline

        pipeline = Pipeline(self.config, self.topology, self._pipeline_schedule)
        self._prepare(pipeline.logical_parameters(), pipeline)
        return PipelineRunner(pipeline, self._autocast)

    def _on_built(self, prefix: str, part: nn.Layer) -> None:
        parameters = {f"{prefix}.{name}": p for name, p in part.named_parameters()}
        self._prepare(parameters, part)
        self.zero.register(parameters, part, block=prefix.startswith("layers."))

    def _prepare(self, parameters: Tensors, part: nn.Layer) -> None:
        """Give a part of the model its initial values and its element type."""
        if self.training:
            initialise(self.config, self.topology, parameters)
        if self._low_precision and self.training:
            paddle.amp.decorate(part, level="O2", dtype=PADDLE_DTYPE[self.config.precision.dtype])
        elif self._low_precision:
            part.to(dtype=PADDLE_DTYPE[self.config.precision.dtype])

    def _build_optimizer(self) -> Any:
        return optimizers.build(self.owned, self.config.optimizer, master_weights=self._low_precision)

    def _pipeline_schedule(self, pipeline: Any) -> Any:
        return paddle.distributed.fleet.distributed_model(pipeline)

    def _shard_inputs(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tensors

    def _autocast(self) -> Any:
        dtype = PADDLE_DTYPE[self.config.precision.dtype] if self._low_precision else "float16"
        return paddle.amp.auto_cast(self._low_precision, level="O2", dtype=dtype)

    @property
    def has_full_model(self) -> bool:
        """Whether this rank alone has all parameters, and can use the model without the others."""
        parallel = self.topology.parallel
        resident = self.zero.resident(self.parameters)
        return parallel.mp_degree * parallel.pp_degree == 1 and len(resident) == len(self.parameters)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next update."""
        self.optimizer.set_lr(lr)

    def forward_backward(self, batch: Batch, count: float, step: int, scaler: Any) -> float:
        """Compute the gradients of this replica's rows, in micro batches; return the sum of their losses.

        Args:
            batch: this replica's rows of the global batch.
            count: counted tokens of the global batch.
            step: number of the step, from 1, which seeds the dropout masks.
            scaler: of the loss, or None.
        """
        self.model.train()
        rows = micro_batch_size(self.config)
        micros = [batch.rows(first, first + rows) for first in range(0, len(batch.inputs_BT), rows)]
        # Micro batches are numbered as in the global batch.
        seed = (self.config.seed, "dropout", step, self.topology.replica * len(micros))
        with self.zero.gathered():
            return self.runner.forward_backward(micros, count, seed, scaler)

    def reduce(self, loss: float) -> tuple[float, float]:
        """Sum the gradients over the replicas; return the loss of the global batch and the global gradient norm."""
        self.zero.collect_gradients(self.parameters)
        gradients.sum_gradients(self.topology, self.parameters)
        return grad_norm.loss_and_norm(self.topology, loss, list(self._unique_parameters().values()))

    def _unique_parameters(self) -> Tensors:
        """Return the owned parameters that are this rank's in checkpoints and sums; no other rank has them there."""
        if not self.topology.writes_checkpoint:
            return {}
        return {name: p for name, p in self.owned.items() if gradients.is_unique_parameter(self.topology, name, p)}

    def update(self, norm: float, loss_scale: float = 1.0) -> None:
        """Clip the gradients, of which ``norm`` is the unscaled norm, and update the parameters."""
        grad_norm.clip(list(self.owned.values()), norm, self.config.optimizer.clip_norm, loss_scale)
        self.optimizer.step()
        self.zero.broadcast_updated(self.parameters)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for p in self.parameters.values():
            p.clear_gradient(False)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[SequentialRunner | PipelineRunner]:
        """Make the model ready for evaluation; yield what runs its batches."""
        self.model.eval()
        with self.zero.gathered():
            yield self.runner

    def state(self) -> tuple[TensorShards, TensorShards]:
        """Return this rank's shards of parameters, in float32, and of optimizer state for a checkpoint."""
        unique, shapes = self._unique_parameters(), parameter_shapes(self.config)
        master, slots = self._optimizer_state()
        values = {name: master.get(name, p) for name, p in self.owned.items()}
        values, slots = self._gather(values), self._gather(slots)
        values = {name: value for name, value in values.items() if name in unique}
        slots = {key: value for key, value in slots.items() if reshard.parameter_of(key, shapes) in unique}
        model, optimizer = (reshard.local_shards(self.topology, arrays, unique, shapes) for arrays in (values, slots))
        return model, optimizer

    def _optimizer_state(self) -> tuple[Tensors, Tensors]:
        return optimizers.state_of(self.optimizer, self.owned)

    def _gather(self, tensors: Tensors) -> Tensors:
        """Return this rank's tensor-parallel shards of parameters or slots; all ranks call it together."""
        return tensors

    def load(self, model: ShardReader, slots: ShardReader | None) -> None:
        """Load this rank's shards of a checkpoint; without ``slots`` the parameters only: moments start at 0.

        Raises:
            ValueError: names or shapes are not those of this model.
        """
        keep_master = self.training and (self._low_precision or self.config.optimizer.offload)
        master: dict[str, Array] = {}

        def assign(name: str, p: Tensor, value: Array) -> None:
            self._load_local(p, paddle.to_tensor(value).astype(p.dtype))
            if keep_master and name in self.owned:
                master[name] = value

        shapes = parameter_shapes(self.config)
        reshard.load_model(self.topology, self.zero.resident(self.parameters), model, shapes, assign)
        if slots is not None:
            own = reshard.read_local_optimizer_state(self.topology, self.owned, slots, shapes)
            self._restore_optimizer(own, master)
        elif keep_master:
            self._restore_optimizer({}, master)

    def _load_local(self, p: Tensor, value: Tensor) -> None:
        p.set_value(value)

    def _restore_optimizer(self, slots: dict[str, Array], master: dict[str, Array]) -> None:
        optimizers.restore(self.optimizer, self.owned, slots, master)


class SemiAutoStrategy(FleetStrategy):
    """Ranks under Paddle's semi-auto engine: parameters are distributed tensors on a mesh."""

    def __init__(self, config: Config, topology: Topology, *, train: bool) -> None:
        self.placement = MeshPlacement.of(config.parallel, topology.rank)
        on_cpu = topology.device is Device.cpu
        if on_cpu:
            from gpt.parallel.cpu import semi_auto_gloo

            semi_auto_gloo.prepare(self.placement.mesh, topology.rank)
        super().__init__(config, topology, train=train)

    @property
    def has_full_model(self) -> bool:
        """Never: this rank's parameters are shards."""
        return False

    def _prepare(self, parameters: Tensors, part: nn.Layer) -> None:
        super()._prepare(parameters, part)
        self.placement.shard_parameters(parameters, part)

    def _build_optimizer(self) -> Any:
        return self.placement.shard_optimizer(super()._build_optimizer())

    def _pipeline_schedule(self, pipeline: Any) -> Any:
        from gpt.model.semi_auto_pipeline import SemiAutoSchedule

        return SemiAutoSchedule(pipeline, self.placement)

    def _shard_inputs(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.placement.shard_inputs(tensors)

    def reduce(self, loss: float) -> tuple[float, float]:
        """Sum the gradients, of which each rank holds shards."""
        self.placement.sum_gradients(self.parameters)
        unique = [
            p
            for name, p in self.parameters.items()
            if self.placement.is_unique_shard(p.grad) and not self.topology.is_shared_embedding_copy(name)
        ]
        return grad_norm.loss_and_norm(self.topology, loss, unique)

    def _gather(self, tensors: Tensors) -> Tensors:
        return {key: self.placement.gather(tensor) for key, tensor in tensors.items()}

    def _load_local(self, p: Tensor, value: Tensor) -> None:
        self.placement.load_local(p, value)

    def _restore_optimizer(self, slots: dict[str, Array], master: dict[str, Array]) -> None:
        self.placement.init_optimizer_state(self.optimizer, list(self.owned.values()))
        own_master, own_slots = optimizers.state_of(self.optimizer, self.owned)
        for tensors, values in ((own_master, master), (own_slots, slots)):
            for key, value in values.items():
                self.placement.load_local(tensors[key], paddle.to_tensor(value))


class StaticStrategy(SemiAutoStrategy):
    """The semi-auto engine's step as one static program, which also sums, clips and updates."""

    def __init__(self, config: Config, topology: Topology, *, train: bool) -> None:
        super().__init__(config, topology, train=train)
        from gpt.parallel.static_step import StaticStep

        clip_norm, micros = config.optimizer.clip_norm, accumulate_steps(config)
        self.program = StaticStep(self.model, self.placement, self.optimizer, clip_norm, micros)
        self._lr = self._norm = 0.0

    def set_lr(self, lr: float) -> None:
        """Keep the rate for ``forward_backward``."""
        self._lr = lr

    def forward_backward(self, batch: Batch, count: float, step: int, scaler: Any) -> float:
        """Run the whole step, which leaves the update out if a gradient is not finite."""
        self.model.train()
        self.topology.seed(self.config.seed, "dropout", step, self.topology.replica)
        inputs, labels, mask = to_tensors(batch)
        loss, self._norm = self.program.step((inputs, labels, mask / count), self._lr)
        return loss

    def reduce(self, loss: float) -> tuple[float, float]:
        """Sum the loss over the replicas; the program has summed the gradients."""
        (loss,) = self.topology.all_reduce_sum(self.topology.mask_to_loss_rank(loss))
        return loss, self._norm

    def update(self, norm: float, loss_scale: float = 1.0) -> None:
        """Do nothing: the program has updated the parameters."""

    def zero_grad(self) -> None:
        """Do nothing: gradients are in the program."""

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[SequentialRunner | PipelineRunner]:
        """Copy the program's parameters to the model first."""
        self.program.sync_to_model()
        with super().evaluating() as runner:
            yield runner

    def _optimizer_state(self) -> tuple[Tensors, Tensors]:
        self.program.sync_to_model()
        return {}, optimizers.to_logical_names(self.program.optimizer_state(), self.owned)

    def _restore_optimizer(self, slots: dict[str, Array], master: dict[str, Array]) -> None:
        self.program.restore(optimizers.to_paddle_names(slots, self.owned))
