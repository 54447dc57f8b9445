"""Coordinates and process groups of a rank. One device is the general case with all degrees 1.

This is the only module that starts Paddle's fleet.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpt.config.cluster import Device
from gpt.config.derived import accumulate_steps, micro_batch_size, world_size
from gpt.config.parameters import parameter
from gpt.config.schema import Config, EngineKind, Parallel
from gpt.utils.rng import derive_seed

if TYPE_CHECKING:
    import paddle


@dataclass(frozen=True)
class Topology:
    """This rank's coordinates and groups. One rank is all degrees 1 and no groups.

    Attributes:
        parallel: the degrees.
        device: resolved: cpu or gpu.
        rank: among all.
        hcg: Fleet's HybridCommunicateGroup, which has the groups; None on one rank.
    """

    parallel: Parallel
    device: Device
    rank: int = 0
    hcg: Any = None

    @classmethod
    def initialize(cls, config: Config) -> Topology:
        """Choose the device and start Fleet, which finds the other ranks by environment variables."""
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
        """Index of this rank's model replica."""
        if self.hcg is None:
            return 0
        degree = self.parallel.sharding_degree
        return int(self.hcg.get_data_parallel_rank() * degree + self.hcg.get_sharding_parallel_rank())

    @property
    def mp_rank(self) -> int:
        """Index of this rank's shard of split weights."""
        return int(self.hcg.get_model_parallel_rank()) if self.hcg else 0

    @property
    def stage(self) -> int:
        """Pipeline stage."""
        return int(self.hcg.get_stage_id()) if self.hcg else 0

    @property
    def zero_degree(self) -> int:
        """Ranks that own whole parameters of a replica's; the semi-auto engine splits each parameter instead."""
        return self.parallel.sharding_degree if self.parallel.engine is EngineKind.fleet else 1

    @property
    def sharding_rank(self) -> int:
        """Rank in the group over which optimizer state is sharded, parameter by parameter."""
        return int(self.hcg.get_sharding_parallel_rank()) if self.zero_degree > 1 else 0

    @property
    def writes_checkpoint(self) -> bool:
        """Whether this rank's shards go into checkpoints: data-parallel ranks have equal ones."""
        if self.parallel.engine is EngineKind.auto:
            return self.replica == 0
        return self.hcg is None or self.hcg.get_data_parallel_rank() == 0

    def is_shared_embedding_copy(self, name: str) -> bool:
        """Return whether this is the last stage's copy of the word table, which belongs to the first stage."""
        return self.stage > 0 and parameter(name).shared

    @property
    def reports_loss(self) -> bool:
        """True on the rank that contributes its replica's loss and count to global sums."""
        return self.mp_rank == 0 and self.stage == self.parallel.pp_degree - 1

    def mask_to_loss_rank(self, value: float) -> float:
        """Return ``value`` on the rank that reports its replica's loss, else 0: a term of a sum over replicas."""
        return value if self.reports_loss else 0.0

    @property
    def mp_group(self) -> Any:
        """Tensor-parallel group."""
        return self.hcg.get_model_parallel_group()

    @property
    def sharding_group(self) -> Any:
        """Replicas over which optimizer state is sharded; None on one rank."""
        return self.hcg.get_sharding_parallel_group() if self.hcg else None

    @property
    def gradient_groups(self) -> list[Any]:
        """Groups over which gradients are summed at the end of a step, one after the other."""
        if self.hcg is None:
            return []
        groups = [self.hcg.get_data_parallel_group()]
        if self.parallel.sharding_stage == 1:
            groups.append(self.sharding_group)
        return [group for group in groups if group.nranks > 1]

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Return the sum of each value over all ranks."""
        if self.hcg is None:
            return list(values)
        import paddle

        sums = paddle.to_tensor(values, dtype="float64")
        paddle.distributed.all_reduce(sums)
        return [float(value) for value in sums.numpy()]

    def all_reduce_max(self, value: float) -> float:
        """Return the largest value of all ranks."""
        if self.hcg is None:
            return value
        import paddle

        largest = paddle.to_tensor([value], dtype="float64")
        paddle.distributed.all_reduce(largest, paddle.distributed.ReduceOp.MAX)
        return float(largest.item())

    def seed(self, *parts: Any) -> None:
        """Seed the random generators with ``parts`` and this rank's coordinates in its replica.

        The ranks of a tensor-parallel group draw the same, except under ``model_parallel_rng``.
        """
        import paddle

        if self.stage:
            parts = (*parts, "stage", self.stage)
        paddle.seed(derive_seed(*parts))
        if self.parallel.mp_degree > 1:
            with self.model_parallel_rng():
                paddle.seed(derive_seed(*parts, "mp", self.mp_rank))

    def model_parallel_rng(self) -> contextlib.AbstractContextManager[Any]:
        """Draw different dropout masks on each mp rank, for activations that are split over them (attention heads)."""
        if self.parallel.mp_degree == 1:
            return contextlib.nullcontext()
        from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker

        return get_rng_state_tracker().rng_state()  # type: ignore[no-any-return]

    def dropout_rng(self) -> contextlib.AbstractContextManager[Any]:
        """Draw the masks between the split linears: under sequence parallel every mp rank has other positions there."""
        return self.model_parallel_rng() if self.parallel.sequence_parallel else contextlib.nullcontext()

    def transpose_sequence_first(self, x: paddle.Tensor) -> paddle.Tensor:
        """Swap the first two axes under sequence parallel, whose layers split the first one; else return ``x``."""
        return x.transpose([1, 0, *range(2, x.ndim)]) if self.parallel.sequence_parallel else x

    def scatter_to_sequence_parallel_region(self, x_BTH: paddle.Tensor) -> paddle.Tensor:
        """Return the input of the blocks: under sequence parallel this mp rank's positions, TBH; else BTH."""
        if not self.parallel.sequence_parallel:
            return x_BTH
        from gpt.parallel import tensor_parallel

        return tensor_parallel.own_positions(self.transpose_sequence_first(x_BTH))

    def gather_from_sequence_parallel_region(self, x: paddle.Tensor) -> paddle.Tensor:
        """Return BTH of the blocks' output: the inverse of ``scatter_to_sequence_parallel_region``."""
        if not self.parallel.sequence_parallel:
            return x
        from gpt.parallel import tensor_parallel

        return self.transpose_sequence_first(tensor_parallel.all_positions(x))

    @property
    def tp_degree(self) -> int:
        """Ranks over which the layers split weights and heads; under the semi-auto engine tensors are split instead."""
        return self.parallel.mp_degree if self.parallel.engine is EngineKind.fleet else 1

    def stage_layers(self, layers: int) -> range:
        """Return the numbers of this stage's blocks, of ``layers`` in all, without virtual stages."""
        each = layers // self.parallel.pp_degree
        return range(self.stage * each, (self.stage + 1) * each)


def _join(config: Config) -> Any:
    """Start Fleet; return its HybridCommunicateGroup."""
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
        # Each mp rank sends its part of a replicated tensor; under sequence parallel tensors differ.
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
