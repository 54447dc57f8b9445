"""The GPT as stages of a pipeline: the same parameters under the same names, split by layer.

B batch, T positions, H hidden. Fleet's schedule (1F1B, or interleaved) or the semi-auto engine's
runs it. The word table is on the first stage, which looks up in it, and on the last, whose head
is tied to it; their gradients are summed by the schedule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import paddle
from paddle import Tensor, nn
from paddle.distributed.fleet.meta_parallel import LayerDesc, PipelineLayer, SharedLayerDesc

from gpt.config.parameters import WORD
from gpt.config.schema import Config
from gpt.model import layers
from gpt.model.gpt import Block, FinalNorm, Position, initialise, word_embedding
from gpt.model.token_scores import label_scores
from gpt.parallel.semi_auto import to_local
from gpt.parallel.topology import Topology

Micro = tuple[Tensor, tuple[Tensor, Tensor]]  # tokens BT; labels BT and the weights BT of their losses


class Word(nn.Layer):  # type: ignore[misc]
    """The word table in the form that Fleet ties between stages: a class with the attribute ``weight``."""

    def __init__(self, config: Config, topology: Topology) -> None:
        super().__init__()
        self.table = word_embedding(config, topology)

    @property
    def weight(self) -> Tensor:
        """The tied weight."""
        return self.table.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return BTH."""
        return self.table(tokens_BT)


def _head(word: Word, x_BTH: Tensor) -> Tensor:
    """Put the word table on the last stage; the head itself is one with the loss (``Pipeline.loss``)."""
    return x_BTH


class Pipeline(PipelineLayer):  # type: ignore[misc]
    """This rank's layers of the model.

    Args:
        config: of the job.
        topology: of this rank.
        make_schedule: Fleet's or the semi-auto engine's over this layer.
    """

    def __init__(self, config: Config, topology: Topology, make_schedule: Callable[[Any], Any]) -> None:
        virtual = config.parallel.virtual_pp_degree
        super().__init__(
            layers=[
                SharedLayerDesc("word", Word, None, "weight", config, topology),
                LayerDesc(Position, config, topology),
                *(LayerDesc(Block, config, topology, i) for i in range(config.model.layers)),
                LayerDesc(FinalNorm, config, topology),
                SharedLayerDesc("word", Word, _head, "weight", config, topology),
            ],
            num_stages=config.parallel.pp_degree,
            loss_fn=self.loss,
            topology=topology.hcg.topology(),
            seg_method="layer:Block",
            num_virtual_pipeline_stages=virtual if virtual > 1 else None,
        )
        self.config = config
        self.topology = topology
        self.loss_sum = 0.0  # of what the schedule has run, on the last stage
        self._scored: list[tuple[Tensor, Tensor]] | None = None  # None: the loss is wanted, not every token's
        self._step: tuple[Any, ...] = ()
        self._begun: Counter[int] = Counter()  # micro batches of the step, by virtual stage
        # In a list: it holds this layer, not the other way round.
        self.schedule: list[Any] = [make_schedule(self)]

    def logical_parameters(self) -> dict[str, Tensor]:
        """Return the parameters of this rank by the names of ``gpt.config.parameters``."""
        parameters: dict[str, Tensor] = {}
        for layer in self.sublayers():
            if isinstance(layer, Word):
                parameters[WORD] = layer.weight
            elif isinstance(layer, Block | Position | FinalNorm):
                parameters |= {f"{layer.prefix}.{name}": p for name, p in layer.named_parameters()}
        return parameters

    def initialise(self) -> None:
        """Give every parameter its initial value."""
        initialise(self.config, self.topology, self.logical_parameters())

    def forward(self, x: Tensor, chunk_id: int | None = None) -> Tensor:
        """Run one micro batch through one (virtual) stage; Fleet's schedule calls it."""
        if self.training:
            chunk = chunk_id or 0
            virtual = ("chunk", chunk) if chunk else ()
            *parts, first = self._step
            self.topology.seed(*parts, first + self._begun[chunk], *virtual)
            self._begun[chunk] += 1
        return super().forward(x, chunk_id)

    def loss(self, x_BTH: Tensor, wanted: tuple[Tensor, Tensor]) -> Tensor:
        """Return the weighted sum of the cross entropies, on the last stage; Fleet's schedule calls it."""
        labels_BT, weight_BT = wanted
        m = self.config.model
        table_VH = self.shared_layers["word"].weight
        if self._scored is not None:
            self._scored.append(label_scores(self.topology, x_BTH, table_VH, labels_BT, m.vocab))
            return weight_BT.sum()
        x_MH = x_BTH.reshape([-1, m.hidden])
        loss = layers.parallel_head_loss(
            self.topology, x_MH, table_VH, labels_BT.flatten(), weight_BT.flatten(), m.vocab, m.loss_chunk
        )
        self.loss_sum += to_local(loss).item()
        return loss

    def begin(self) -> None:
        """Begin a step: reset its loss and its count of micro batches."""
        self._begun, self.loss_sum = Counter(), 0.0

    def forward_backward(self, micros: Iterable[Micro], step: tuple[Any, ...], scaler: Any) -> float:
        """Compute the gradients of all micro batches of a step; return the loss on the last stage, elsewhere 0.

        Args:
            micros: ``accumulate_steps`` of them.
            step: what the dropout masks of the first micro batch are a function of; its last part counts up.
            scaler: of the loss, or None.
        """
        self._step = step
        self.begin()
        (schedule,) = self.schedule
        if self.config.parallel.virtual_pp_degree > 1:
            schedule.set_virtual_pipeline_rank(0)
        schedule.forward_backward_pipeline(iter(micros), scaler)
        return self.loss_sum

    def evaluate(self, micros: Iterable[Micro]) -> float:
        """Return the loss of ``accumulate_steps`` micro batches on the last stage, elsewhere 0."""
        self.loss_sum = 0.0
        self.schedule[0].eval_batch(iter(micros), compute_loss=True)
        return self.loss_sum

    def scores(self, micros: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Return ``label_scores`` of ``accumulate_steps`` inputs and labels BT; only the last stage has them.

        All have one shape, which may differ from call to call.
        """
        self._scored = []
        (schedule,) = self.schedule
        unused = paddle.zeros([1], dtype="float32")
        schedule.eval_batch(iter([(inputs, (labels, unused)) for inputs, labels in micros]), compute_loss=True)
        schedule._p2p_helper.clear_meta_cache()  # shapes that the stages have exchanged
        scores, self._scored = self._scored, None
        return scores
