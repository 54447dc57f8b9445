"""The schedule of a pipeline under the semi-auto engine: Paddle's own, in place of Fleet's.

Every rank has tensors of its own stage only, on the mesh of that stage's ranks; between stages their parts travel as
plain tensors. A rank that meets a tensor of another stage's mesh ends on a CPU with a segmentation fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.distributed.auto_parallel.pipelining.schedules import Schedule1F1B, ScheduleFThenB
from paddle.distributed.auto_parallel.pipelining.stage import PipelineStage

from gpt.config.derived import accumulate_steps
from gpt.config.parameters import WORD
from gpt.parallel.semi_auto import MeshPlacement, to_local


class SemiAutoSchedule:
    """Runs the micro batches of this rank's stage, under the two names that Fleet's schedule has for it.

    Args:
        model: this stage, a ``gpt.model.pipeline.Pipeline`` whose parameters are distributed tensors.
        placement: of this rank.
    """

    def __init__(self, model: Any, placement: MeshPlacement) -> None:
        self.model, self.placement = model, placement
        self.scaler: Any = None
        self.count = accumulate_steps(model.config)
        self._train = Schedule1F1B(self._stage(), self.count, self._scaled_loss)
        self._evaluate = ScheduleFThenB(self._stage(), self.count)

    def _stage(self) -> PipelineStage:
        topology = self.model.topology
        group = topology.hcg.get_pipe_parallel_group()
        return PipelineStage(self.model, topology.stage, topology.parallel.pp_degree, group=group)

    def _scaled_loss(self, x_BTH: Tensor, wanted: tuple[Tensor, Tensor]) -> Tensor:
        loss = self.model.loss(x_BTH, wanted)
        return self.scaler.scale(loss) if self.scaler else loss

    def forward_backward_pipeline(self, micros: Iterator[Any], scaler: Any) -> None:
        """Run forward and backward over all micro batches; sum gradients of the tied table over its stages."""
        self.scaler = scaler
        inputs, wanted = self._placed(micros)
        if not self._train._stage_initialized:  # stages tell each other shapes by a run over zeros
            self._train._initialize_stage(inputs[0], {}, wanted[0])
            self.model.begin()
        # ``step`` would cut the micro batches itself, across the replicas' rows.
        self._train._step_microbatches(inputs, None, wanted)
        self._train._stage.clear_runtime_states()
        for shared in self.model.shared_comm.values():  # the word table
            table = shared["layer"].weight
            self.placement.sum_gradients({WORD: table})
            with paddle.no_grad():
                dist.all_reduce(to_local(table.grad), group=shared["group"])

    def eval_batch(self, micros: Iterator[Any], compute_loss: bool) -> None:
        """Run forward over all micro batches, with their losses on the last stage."""
        inputs, wanted = self._placed(micros)
        stage = self._evaluate._stage
        if not self._evaluate._stage_initialized:  # its own way to do this wants a loss to differentiate
            stage._prepare_forward_infra(self.count, inputs[0], {})
            self._evaluate._stage_initialized = True
        self._evaluate._step_microbatches(inputs, None, wanted)
        if stage.is_last and compute_loss:
            for x_BTH, labels in zip(stage.output_chunks, wanted, strict=True):
                self.model.loss(x_BTH, labels)
        stage.fwd_cache.clear()
        stage.output_chunks.clear()

    def _placed(self, micros: Iterator[Any]) -> tuple[list[Any], list[Any]]:
        """Return, for each micro batch, the arguments of this stage's layers, and those of the loss."""
        inputs, wanted = [], []
        for tokens, (labels, weight) in micros:
            tokens_BT, labels_BT, weight_BT = self.placement.shard_inputs((tokens, labels, weight))
            inputs.append((tokens_BT,) if self.model.topology.stage == 0 else ())
            wanted.append((labels_BT, weight_BT))
        return inputs, wanted
