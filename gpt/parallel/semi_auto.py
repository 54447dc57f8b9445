"""Paddle's semi-auto engine: distributed tensors on a mesh.

Parameters (by the table in ``gpt.config.parameters``) and inputs become tensors of the global shape of which this rank
holds a shard. Paddle then derives, operation by operation, what every rank computes and communicates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.distributed.auto_parallel import api

from gpt.config.parameters import MP, REPLICAS, parameter
from gpt.config.schema import Parallel

if TYPE_CHECKING:
    from paddle import Tensor, nn


def to_local(tensor: Tensor) -> Tensor:
    """Return the shard that this rank holds of a tensor: the same memory."""
    return tensor._local_value() if tensor.is_dist() else tensor


@dataclass(frozen=True)
class MeshPlacement:
    """Placements of a rank's tensors on the mesh of replicas and mp ranks; of a pipeline, on that of its stage.

    Args:
        mesh: axes ``REPLICAS`` and ``MP``, each only if it has more than one rank; on one rank ``REPLICAS``.
        place_of: this rank's index along each axis.
        sharding_stage: ZeRO stage over the replicas: 1 optimizer state, 2 and gradients, 3 and parameters; 0 none.
    """

    mesh: Any
    place_of: dict[str, int]
    sharding_stage: int

    @classmethod
    def of(cls, parallel: Parallel, rank: int) -> MeshPlacement:
        """Make the mesh of a rank; Fleet numbers ranks by dp, then pp, sharding and mp."""
        dp, sharding, mp, pp = (getattr(parallel, f"{name}_degree") for name in ("dp", "sharding", "mp", "pp"))
        ranks = np.arange(dp * pp * sharding * mp).reshape(dp, pp, sharding, mp).swapaxes(0, 1)
        ranks = ranks.reshape(pp, dp * sharding, mp)
        ((stage, replica, mp_rank),) = np.argwhere(ranks == rank).tolist()
        axes = [name for name, size in ((REPLICAS, dp * sharding), (MP, mp)) if size > 1] or [REPLICAS]
        shape = [dp * sharding if name == REPLICAS else mp for name in axes]
        mesh = dist.ProcessMesh(ranks[stage].reshape(shape), dim_names=axes)
        stages = dist.ProcessMesh(ranks.reshape(pp, *shape), dim_names=["pp", *axes])  # as Paddle's schedules call it
        dist.auto_parallel.set_mesh(stages if pp > 1 else mesh)
        place = {REPLICAS: replica, MP: mp_rank}
        sharded = parallel.sharding_stage if sharding > 1 else 0
        return cls(mesh, {name: place[name] for name in axes}, sharded)

    def _along(self, **wanted: int | None) -> list[Any]:
        """Return placements along the axes of the mesh, given the tensor axis that each splits, or None."""
        axes = [wanted.get(name) for name in self.mesh.dim_names]
        return [dist.Replicate() if axis is None else dist.Shard(axis) for axis in axes]

    def shard_parameters(self, parameters: dict[str, Tensor], part: nn.Layer) -> None:
        """Make distributed tensors of a part's parameters, given by logical name; until now each rank has all."""
        axes = {id(p): parameter(name).tp_axis for name, p in parameters.items()}
        for layer in part.sublayers(include_self=True):
            for name, p in list(layer._parameters.items()):
                layer._parameters[name] = dist.shard_tensor(p, self.mesh, self._along(mp=axes[id(p)]))

    def shard_inputs(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return tensors of the micro batch of all replicas, of which this replica holds its rows."""
        return tuple(api.dtensor_from_local(tensor, self.mesh, self._along(replicas=0)) for tensor in tensors)

    def shard_optimizer(self, inner: Any) -> Any:
        """Wrap an optimizer so that its state is split according to the sharding stage."""
        stages = {0: None, 1: dist.ShardingStage1, 2: dist.ShardingStage2, 3: dist.ShardingStage3}
        stage = stages[self.sharding_stage]
        return dist.shard_optimizer(inner, stage(REPLICAS, self.mesh) if stage else None)

    def sum_gradients(self, parameters: dict[str, Tensor]) -> None:
        """Sum the partial gradients over the replicas, in place."""
        with paddle.no_grad():
            for p in parameters.values():
                if p.grad is not None and any(placement.is_partial() for placement in p.grad.placements):
                    whole = dist.reshard(p.grad, self.mesh, p.placements)
                    p.grad.get_tensor()._share_data_with(whole.get_tensor())

    def _without_replicas(self, tensor: Tensor) -> list[Any]:
        """Return the placements of a tensor that the replicas may split, but each of them with its whole mp shard."""
        axes = zip(self.mesh.dim_names, tensor.placements, strict=True)
        return [placement if axis == MP else dist.Replicate() for axis, placement in axes]

    def is_unique_shard(self, tensor: Tensor) -> bool:
        """Return whether a sum over all ranks counts this rank's shard: of replicated shards the first rank's."""
        places = zip(tensor.placements, tensor.process_mesh.dim_names, strict=True)
        return all(placement.is_shard() or self.place_of[axis] == 0 for placement, axis in places)

    def gather(self, tensor: Tensor) -> Tensor:
        """Return this rank's tensor-parallel shard of a parameter or slot that the replicas may split; collective."""
        if not tensor.is_dist():
            return tensor
        return to_local(dist.reshard(tensor, self.mesh, self._without_replicas(tensor)))

    def load_local(self, tensor: Tensor, part: Tensor) -> None:
        """Set ``tensor`` to the values of this rank's tensor-parallel shard: the inverse of ``gather``."""
        if not tensor.is_dist():
            tensor.set_value(part)
            return
        whole = api.dtensor_from_local(part, self.mesh, self._without_replicas(tensor))
        to_local(tensor).copy_(to_local(dist.reshard(whole, self.mesh, tensor.placements)), False)

    def from_local(self, part: Tensor, placements: list[Any]) -> Tensor:
        """Return the distributed tensor of which ``part`` is this rank's shard."""
        return api.dtensor_from_local(part, self.mesh, placements)

    def init_optimizer_state(self, optimizer: Any, parameters: list[Tensor]) -> None:
        """Create a new optimizer's slots as distributed tensors, before the first update."""
        optimizer._create_accumulators(paddle.static.default_main_program().global_block(), parameters)
