"""Coordinates and process groups of a rank. One device is the general case with all degrees 1.

This is the only module that starts Paddle's fleet.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt.config.cluster import Device
from gpt.config.derived import accumulate_steps, micro_batch_size, world_size
from gpt.config.parameters import MP, parameter
from gpt.config.schema import Config, EngineKind, Parallel
from gpt.utils.arrays import Array
from gpt.utils.rng import derive_seed

if TYPE_CHECKING:
    import paddle


@dataclass(frozen=True)
class Topology:
    """This rank's place. One rank is all degrees 1 and no groups.

    Attributes:
        parallel: the degrees.
        device: resolved: cpu or gpu.
        rank: among all.
        hcg: Fleet's HybridCommunicateGroup, which knows the groups; None on one rank.
    """

    parallel: Parallel
    device: Device
    rank: int = 0
    hcg: Any = None

    @classmethod
    def initialize(cls, config: Config) -> Topology:
        """Choose the device and join the other ranks, whose places are in the environment."""
        import paddle

        paddle.set_device(config.cluster.device.value)
        if world_size(config) == 1:
            return cls(config.parallel, config.cluster.device)
        hcg = _join(config)
        return cls(config.parallel, config.cluster.device, hcg.get_global_rank(), hcg)

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.replicas * self.parallel.mp_degree * self.parallel.pp_degree

    @property
    def replicas(self) -> int:
        """Model replicas, which read different samples."""
        return self.parallel.dp_degree * self.parallel.sharding_degree

    @property
    def replica(self) -> int:
        """The model replica that this rank is of."""
        if self.hcg is None:
            return 0
        degree = self.parallel.sharding_degree
        return int(self.hcg.get_data_parallel_rank() * degree + self.hcg.get_sharding_parallel_rank())

    @property
    def mp_rank(self) -> int:
        """Which slice of split weights this rank has."""
        return int(self.hcg.get_model_parallel_rank()) if self.hcg else 0

    @property
    def stage(self) -> int:
        """Place in the pipeline."""
        return int(self.hcg.get_stage_id()) if self.hcg else 0

    @property
    def zero_degree(self) -> int:
        """Ranks that own whole parameters of a replica's; the semi-auto engine splits each parameter instead."""
        return self.parallel.sharding_degree if self.parallel.engine is EngineKind.fleet else 1

    @property
    def sharding_rank(self) -> int:
        """Place among the ranks that share out the optimizer's state, parameter by parameter."""
        return int(self.hcg.get_sharding_parallel_rank()) if self.zero_degree > 1 else 0

    @property
    def writes_checkpoint(self) -> bool:
        """Whether this rank gives its arrays to a checkpoint: data parallel ranks have the same ones."""
        if self.parallel.engine is EngineKind.auto:
            return self.replica == 0
        return self.hcg is None or self.hcg.get_data_parallel_rank() == 0

    def is_shared_embedding_copy(self, name: str) -> bool:
        """Return whether this is the last stage's copy of the word table, which belongs to the first stage."""
        return self.stage > 0 and parameter(name).shared

    @property
    def reports_loss(self) -> bool:
        """Whether this rank gives its replica's loss and count: the ranks of one replica know the same or nothing."""
        return self.mp_rank == 0 and self.stage == self.parallel.pp_degree - 1

    def mask_to_loss_rank(self, value: float) -> float:
        """Return ``value`` on the rank that reports its replica's loss, else 0: a term of a sum over replicas."""
        return value if self.reports_loss else 0.0

    @property
    def mp_group(self) -> Any:
        """Ranks that share out split weights."""
        return self.hcg.get_model_parallel_group()

    @property
    def sharding_group(self) -> Any:
        """Replicas that share out the optimizer's state; None on one rank."""
        return self.hcg.get_sharding_parallel_group() if self.hcg else None

    @property
    def gradient_groups(self) -> list[Any]:
        """Groups over which, one after the other, gradients are added up at the end of a step."""
        if self.hcg is None:
            return []
        groups = [self.hcg.get_data_parallel_group()]
        if self.parallel.sharding_stage == 1:
            groups.append(self.sharding_group)
        return [group for group in groups if group.nranks > 1]

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Each value added up over all ranks."""
        if self.hcg is None:
            return list(values)
        import paddle

        sums = paddle.to_tensor(values, dtype="float64")
        paddle.distributed.all_reduce(sums)
        return [float(value) for value in sums.numpy()]

    def all_reduce_max(self, value: float) -> float:
        """The largest of all ranks' values."""
        if self.hcg is None:
            return value
        import paddle

        found = paddle.to_tensor([value], dtype="float64")
        paddle.distributed.all_reduce(found, paddle.distributed.ReduceOp.MAX)
        return float(found.item())

    def local_shard(self, whole: Array, p: paddle.Tensor) -> Array:
        """This rank's slice of a parameter's whole value."""
        axis = tp_axis(p)
        return whole if axis is None else np.split(whole, self.parallel.mp_degree, axis)[self.mp_rank]

    def local_shape(self, p: paddle.Tensor) -> list[int]:
        """Shape of this rank's slice of a parameter, whatever sharding leaves of it."""
        axis = tp_axis(p) if p.is_dist() else None
        return [size // (self.parallel.mp_degree if i == axis else 1) for i, size in enumerate(p.shape)]

    def global_shape(self, p: paddle.Tensor) -> list[int]:
        """Shape of the parameter that ``p`` is a slice of; of a placed one it is its own."""
        axis = None if p.is_dist() else tp_axis(p)
        return [size * (self.parallel.mp_degree if i == axis else 1) for i, size in enumerate(p.shape)]

    def seed(self, *parts: Any) -> None:
        """Make what is random from here on a function of ``parts`` and of the place of this rank in its replica.

        The ranks of an mp group draw the same, except under ``model_parallel_rng``.
        """
        import paddle

        if self.stage:
            parts = (*parts, "stage", self.stage)
        paddle.seed(derive_seed(*parts))
        if self.parallel.mp_degree > 1:
            with self.model_parallel_rng():
                paddle.seed(derive_seed(*parts, "mp", self.mp_rank))

    def model_parallel_rng(self) -> contextlib.AbstractContextManager[Any]:
        """Where activations are shared out among the mp ranks (attention heads), their dropout masks differ."""
        if self.parallel.mp_degree == 1:
            return contextlib.nullcontext()
        from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker

        return get_rng_state_tracker().rng_state()  # type: ignore[no-any-return]

    def dropout_rng(self) -> contextlib.AbstractContextManager[Any]:
        """For dropout between the split linears: under sequence parallel every mp rank has other positions there."""
        return self.model_parallel_rng() if self.parallel.sequence_parallel else contextlib.nullcontext()

    def transpose_sequence_first(self, x: paddle.Tensor) -> paddle.Tensor:
        """B T ... to T B ... or back under sequence parallel, whose layers share out the first axis; else as it is."""
        return x.transpose([1, 0, *range(2, x.ndim)]) if self.parallel.sequence_parallel else x

    def scatter_to_sequence_parallel_region(self, x_BTH: paddle.Tensor) -> paddle.Tensor:
        """BTH as the blocks want it: under sequence parallel this mp rank's positions, TBH."""
        if not self.parallel.sequence_parallel:
            return x_BTH
        from gpt.parallel import tensor_parallel

        return tensor_parallel.own_positions(self.transpose_sequence_first(x_BTH))

    def gather_from_sequence_parallel_region(self, x: paddle.Tensor) -> paddle.Tensor:
        """The inverse of ``scatter_to_sequence_parallel_region``."""
        if not self.parallel.sequence_parallel:
            return x
        from gpt.parallel import tensor_parallel

        return self.transpose_sequence_first(tensor_parallel.all_positions(x))

    def has_partial_gradient(self, name: str, p: paddle.Tensor) -> bool:
        """Return whether the gradient covers this rank's positions only: replicated weights under sequence parallel."""
        sequence_parallel = self.parallel.sequence_parallel and parameter(name).part != "embedding"
        return sequence_parallel and tp_axis(p) is None

    @property
    def tp_degree(self) -> int:
        """Ranks over which the layers split weights and heads; under the semi-auto engine tensors are split instead."""
        return self.parallel.mp_degree if self.parallel.engine is EngineKind.fleet else 1

    def stage_layers(self, layers: int) -> range:
        """Numbers of the blocks that this stage has, of ``layers`` in all, without virtual stages."""
        each = layers // self.parallel.pp_degree
        return range(self.stage * each, (self.stage + 1) * each)


def tp_axis(p: paddle.Tensor) -> int | None:
    """Return the axis along which a tensor is split over the tensor-parallel ranks; None: it is replicated."""
    if not p.is_dist():
        return int(p.split_axis) if getattr(p, "is_distributed", False) else None
    placement = dict(zip(p.process_mesh.dim_names, p.placements, strict=True)).get(MP)
    return int(placement.get_dim()) if placement is not None and placement.is_shard() else None


def _join(config: Config) -> Any:
    """Start fleet; returns its HybridCommunicateGroup."""
    from paddle.distributed import fleet

    parallel, on_cpu = config.parallel, config.cluster.device is Device.cpu
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {
        "dp_degree": parallel.dp_degree,
        "sharding_degree": parallel.sharding_degree,
        "mp_degree": parallel.mp_degree,
        "pp_degree": parallel.pp_degree,
        "mp_configs": {"need_broadcast_data": False},  # the ranks of a replica read the same samples themselves
        "pp_configs": {"delay_scale_loss": True},  # the loss is divided by the counted tokens, not by micro batches
    }
    strategy.pipeline_configs = {
        "accumulate_steps": accumulate_steps(config),
        "micro_batch_size": micro_batch_size(config),
        # Each mp rank sends its part of what all have; under sequence parallel they have different things.
        "enable_partial_send_recv": not on_cpu and not parallel.sequence_parallel,
    }
    if on_cpu:
        from gpt.parallel.cpu import gloo

        gloo.prepare()
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # a table of flags
        warnings.filterwarnings("ignore", message="Current global rank .* is not in group")
        fleet.init(is_collective=True, strategy=strategy, log_level="WARNING")
    hcg = fleet.get_hybrid_communicate_group()
    if on_cpu:
        gloo.link(hcg, ring=parallel.virtual_pp_degree > 1)
    if parallel.mp_degree > 1:
        fleet.meta_parallel.model_parallel_random_seed(config.seed + 1)
    return hcg
