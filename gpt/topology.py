"""Degrees to coordinates to layers. One device is the general case with all degrees 1.

This is the only module that may start Paddle's fleet, and the one place the model asks for its linears.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt.config import Config, Device, EngineKind, Parallel, accumulate_steps, micro_batch_size, world_size
from gpt.data.tokens import Array
from gpt.shapes import WORD

if TYPE_CHECKING:
    import paddle

    from gpt.semi_auto import Placed


def derive_seed(*parts: Any) -> int:
    """A 31-bit seed that depends on all parts and on nothing else.

    Example:
        >>> derive_seed(1024, "dropout", 7) == derive_seed(1024, "dropout", 7)
        True
    """
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little") & 0x7FFFFFFF


def initial_value(seed: int, name: str, shape: list[int], std: float) -> Array:
    """N(0, std^2) for a parameter's whole shape, from the seed and its logical name only.

    A rank that holds a slice takes it from the whole, so initial weights are the same on every topology.
    """
    key = hashlib.sha256(f"init {seed} {name}".encode()).digest()
    rng = np.random.Generator(np.random.SFC64(np.frombuffer(key, dtype=np.uint32)))
    values = rng.standard_normal(shape, dtype=np.float32)
    values *= np.float32(std)
    return values


@dataclass(frozen=True)
class Topology:
    """This rank's place. One rank is all degrees 1 and no groups.

    Attributes:
        parallel: the degrees.
        device: resolved: cpu or gpu.
        rank: among all.
        hcg: Fleet's HybridCommunicateGroup, which knows the groups; None on one rank.
        placed: where the semi-auto engine has this rank's tensors; None if Fleet's layers share the model out.
    """

    parallel: Parallel
    device: Device
    rank: int = 0
    hcg: Any = None
    placed: Placed | None = None

    @classmethod
    def connect(cls, config: Config) -> Topology:
        """Choose the device and join the other ranks, whose places are in the environment."""
        import paddle

        paddle.set_device(config.cluster.device.value)
        if world_size(config) == 1:
            return cls(config.parallel, config.cluster.device)
        hcg = _join(config)
        placed = _place(config, hcg) if config.parallel.engine is EngineKind.auto else None
        return cls(config.parallel, config.cluster.device, hcg.get_global_rank(), hcg, placed)

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
    def owners(self) -> int:
        """Among how many ranks parameters are shared out whole: the semi-auto engine cuts each of them instead."""
        return 1 if self.placed else self.parallel.sharding_degree

    @property
    def sharding_rank(self) -> int:
        """Place among the ranks that share out the optimizer's state, parameter by parameter."""
        return int(self.hcg.get_sharding_parallel_rank()) if self.owners > 1 else 0

    @property
    def answers(self) -> bool:
        """Whether this rank gives its arrays to a checkpoint: data parallel ranks have the same ones."""
        if self.placed:
            return self.replica == 0
        return self.hcg is None or self.hcg.get_data_parallel_rank() == 0

    def is_tied_copy(self, name: str) -> bool:
        """Whether this rank has the word table only for the head, on the last stage; it is the first stage's."""
        return name == WORD and self.stage > 0

    @property
    def speaks(self) -> bool:
        """Whether this rank gives its replica's loss and count: the ranks of one replica know the same or nothing."""
        return self.mp_rank == 0 and self.stage == self.parallel.pp_degree - 1

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

    def totals(self, *values: float) -> list[float]:
        """Each value added up over all ranks."""
        if self.hcg is None:
            return list(values)
        import paddle

        sums = paddle.to_tensor(values, dtype="float64")
        paddle.distributed.all_reduce(sums)
        return [float(value) for value in sums.numpy()]

    def largest(self, value: float) -> float:
        """The largest of all ranks' values."""
        if self.hcg is None:
            return value
        import paddle

        found = paddle.to_tensor([value], dtype="float64")
        paddle.distributed.all_reduce(found, paddle.distributed.ReduceOp.MAX)
        return float(found.item())

    def part(self, whole: Array, p: paddle.Tensor) -> Array:
        """This rank's slice of a parameter's whole value."""
        axis = split_axis(p)
        return whole if axis is None else np.split(whole, self.parallel.mp_degree, axis)[self.mp_rank]

    def own_shape(self, p: paddle.Tensor) -> list[int]:
        """Shape of this rank's slice of a parameter, whatever sharding leaves of it."""
        axis = split_axis(p) if p.is_dist() else None
        return [size // (self.parallel.mp_degree if i == axis else 1) for i, size in enumerate(p.shape)]

    def whole_shape(self, p: paddle.Tensor) -> list[int]:
        """Shape of the parameter that ``p`` is a slice of; of a placed one it is its own."""
        axis = None if p.is_dist() else split_axis(p)
        return [size * (self.parallel.mp_degree if i == axis else 1) for i, size in enumerate(p.shape)]

    def seed(self, *parts: Any) -> None:
        """Make what is random from here on a function of ``parts`` and of the place of this rank in its replica.

        The ranks of an mp group draw the same, except under ``own_masks``.
        """
        import paddle

        if self.stage:
            parts = (*parts, "stage", self.stage)
        paddle.seed(derive_seed(*parts))
        if self.parallel.mp_degree > 1:
            with self.own_masks():
                paddle.seed(derive_seed(*parts, "mp", self.mp_rank))

    def own_masks(self) -> contextlib.AbstractContextManager[Any]:
        """Where activations are shared out among the mp ranks (attention heads), their dropout masks differ."""
        if self.parallel.mp_degree == 1:
            return contextlib.nullcontext()
        from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker

        return get_rng_state_tracker().rng_state()  # type: ignore[no-any-return]

    def branch_masks(self) -> contextlib.AbstractContextManager[Any]:
        """For dropout between the split linears: under sequence parallel every mp rank has other positions there."""
        return self.own_masks() if self.parallel.sequence_parallel else contextlib.nullcontext()

    def turned(self, x: paddle.Tensor) -> paddle.Tensor:
        """B T ... to T B ... or back under sequence parallel, whose layers share out the first axis; else as it is."""
        return x.transpose([1, 0, *range(2, x.ndim)]) if self.parallel.sequence_parallel else x

    def enter_blocks(self, x_BTH: paddle.Tensor) -> paddle.Tensor:
        """BTH as the blocks want it: under sequence parallel this mp rank's positions, TBH."""
        if not self.parallel.sequence_parallel:
            return x_BTH
        from gpt import tensor_parallel

        return tensor_parallel.own_positions(self.turned(x_BTH))

    def leave_blocks(self, x: paddle.Tensor) -> paddle.Tensor:
        """The inverse of ``enter_blocks``."""
        if not self.parallel.sequence_parallel:
            return x
        from gpt import tensor_parallel

        return self.turned(tensor_parallel.all_positions(x))

    def sees_part(self, name: str, p: paddle.Tensor) -> bool:
        """Whether this mp rank's gradient of a parameter that all mp ranks have is of its own positions only."""
        in_blocks = name.startswith(("layers.", "norm."))
        return self.parallel.sequence_parallel and in_blocks and split_axis(p) is None

    @property
    def split(self) -> int:
        """Among how many ranks the layers of the model share out their weights and heads themselves."""
        return 1 if self.placed else self.parallel.mp_degree

    def column_linear(self, size_in: int, size_out: int) -> paddle.nn.Layer:
        """A linear whose output columns are shared out among the mp ranks; not yet initialised."""
        if self.split > 1:
            from gpt import tensor_parallel

            return tensor_parallel.column_linear(size_in, size_out, by_position=self.parallel.sequence_parallel)
        from gpt import ops

        return ops.Linear(size_in, size_out)

    def row_linear(self, size_in: int, size_out: int) -> paddle.nn.Layer:
        """A linear whose input rows are shared out among the mp ranks; not yet initialised."""
        if self.split > 1:
            from gpt import tensor_parallel

            return tensor_parallel.row_linear(size_in, size_out, by_position=self.parallel.sequence_parallel)
        from gpt import ops

        return ops.Linear(size_in, size_out)

    def embedding(self, rows: int, size: int) -> paddle.nn.Layer:
        """A table whose rows are shared out among the mp ranks; not yet initialised."""
        if self.split > 1:
            from gpt import tensor_parallel

            return tensor_parallel.embedding(rows, size)
        import paddle

        return paddle.nn.Embedding(rows, size, weight_attr=paddle.nn.initializer.Constant(0.0))

    def own_layers(self, layers: int) -> range:
        """Numbers of the blocks that this stage has, of ``layers`` in all, without virtual stages."""
        each = layers // self.parallel.pp_degree
        return range(self.stage * each, (self.stage + 1) * each)

    def head_loss(
        self,
        x_MH: paddle.Tensor,
        table_VH: paddle.Tensor,
        labels_M: paddle.Tensor,
        weight_M: paddle.Tensor,
        vocab: int,
        chunk: int,
    ) -> paddle.Tensor:
        """``gpt.ops.head_loss``, over the mp ranks' shares of the table."""
        if self.split > 1:
            from gpt import tensor_parallel

            return tensor_parallel.head_loss(x_MH, table_VH, labels_M, weight_M, vocab, chunk, self.mp_group)
        from gpt import ops

        return ops.head_loss(x_MH, table_VH, labels_M, weight_M, vocab, chunk)


def split_axis(p: paddle.Tensor) -> int | None:
    """The axis along which the mp ranks share out a parameter; None if each has all of it."""
    if p.is_dist():
        from gpt import semi_auto

        return semi_auto.split_axis(p)
    return int(p.split_axis) if getattr(p, "is_distributed", False) else None


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
        from gpt import gloo

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


def _place(config: Config, hcg: Any) -> Placed:
    """Where the semi-auto engine has this rank's tensors."""
    from gpt.semi_auto import Placed

    placed = Placed.of(config.parallel, hcg.get_global_rank())
    on_cpu = config.cluster.device is Device.cpu
    if on_cpu:
        from gpt import gloo_auto

        gloo_auto.prepare(placed.mesh, hcg.get_global_rank())
    return placed
