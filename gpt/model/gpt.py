"""The GPT: pre-LN blocks, tanh-GELU, learned positions, head tied to the embedding.

Shapes are in names: B batch, T positions, H hidden, N heads, D head size (H = N D), F ffn, V vocabulary.
The maths is GPT-2's (Radford et al., 2019). The columns of the fused qkv are ordered by head (q_j k_j v_j), so that
splitting the columns splits the heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import paddle
from paddle import Tensor, nn
from paddle.distributed.fleet.utils import recompute
from paddle.nn import functional as F

from gpt.config.derived import padded_vocab
from gpt.config.parameters import Init, parameter
from gpt.config.schema import Config, Recompute
from gpt.model import cpu_decode, layers
from gpt.model.kv_cache import Cache
from gpt.parallel import pipeline_comm, tensor_shards
from gpt.parallel.topology import Topology
from gpt.utils.arrays import Array
from gpt.utils.rng import initial_value

OnBuilt = Callable[[str, nn.Layer], None]


class Attention(nn.Layer):  # type: ignore[misc]
    """Causal self-attention with fused projections."""

    def __init__(self, config: Config, topology: Topology, recompute_core: bool) -> None:
        super().__init__()
        m = config.model
        self.heads = m.heads // topology.tp_degree
        self.size = m.hidden // m.heads
        self.dropout = m.attention_dropout
        self.topology = topology
        self.recompute_core = recompute_core
        self.qkv = layers.column_linear(topology, m.hidden, 3 * m.hidden)
        self.out = layers.row_linear(topology, m.hidden, m.hidden)

    def forward(self, x_BTH: Tensor) -> Tensor:
        """Attend to all earlier positions; return BTH before the residual sum, or TBH under sequence parallel."""
        qkv_BTE = self.topology.transpose_sequence_first(self.qkv(x_BTH))
        B, T, _ = qkv_BTE.shape
        qkv_BTNE = qkv_BTE.reshape([B, T, self.heads, 3 * self.size])
        dropout = self.dropout if self.training else 0.0
        if self.recompute_core and self.training:
            mixed_BTND = recompute(self._core_attention, qkv_BTNE, dropout)
        else:
            mixed_BTND = self._core_attention(qkv_BTNE, dropout)
        return self.out(self.topology.transpose_sequence_first(mixed_BTND.reshape([B, T, self.heads * self.size])))

    def _core_attention(self, qkv_BTNE: Tensor, dropout: float) -> Tensor:
        with self.topology.model_parallel_rng():
            return layers.causal_attention(qkv_BTNE, dropout)

    def forward_cached(self, x_BTH: Tensor, cache: Cache, layer: int) -> Tensor:
        """Attend from new positions to those of the cache, too, which gets their keys and values; no dropout."""
        B, T, _ = x_BTH.shape
        qkv_BTNE = self.qkv(x_BTH).reshape([B, T, self.heads, 3 * self.size])
        keys, values = cache.keys[layer], cache.values[layer]
        mixed_BTND = layers.attention_after(qkv_BTNE, keys, values, cache.length, cache.pads_B)
        return self.out(mixed_BTND.reshape([B, T, self.heads * self.size]))


class Block(nn.Layer):  # type: ignore[misc]
    """x + attention(norm(x)), then x + mlp(norm(x)), each branch with dropout at its end."""

    def __init__(self, config: Config, topology: Topology, layer: int) -> None:
        super().__init__()
        m = config.model
        self.prefix = f"layers.{layer}"
        exempt = layer in m.no_recompute_layers
        self.recompute = Recompute.none if exempt else m.recompute
        self.dropout = m.dropout
        self.topology = topology
        self.norm1 = layers.LayerNorm(m.hidden, m.layer_norm_eps)
        self.attention = Attention(config, topology, self.recompute is Recompute.core_attn)
        self.norm2 = layers.LayerNorm(m.hidden, m.layer_norm_eps)
        self.fc1 = layers.column_linear(topology, m.hidden, m.ffn)
        self.fc2 = layers.row_linear(topology, m.ffn, m.hidden)

    def forward(self, x_BTH: Tensor) -> Tensor:
        """Run the block on BTH, with recomputation in the backward pass as configured."""
        if self.recompute is Recompute.full and self.training:
            out: Tensor = recompute(self._block, x_BTH)
            return out
        return self._block(x_BTH)

    def _block(self, x_BTH: Tensor) -> Tensor:
        normed = self.norm1(x_BTH)
        if self.recompute is Recompute.full_attn and self.training:
            mixed = recompute(self.attention, normed)
        else:
            mixed = self.attention(normed)
        with self.topology.dropout_rng():
            x_BTH = x_BTH + layers.dropout(mixed, self.dropout, self.training)
        branch = self.mlp(self.norm2(x_BTH))
        with self.topology.dropout_rng():
            return x_BTH + layers.dropout(branch, self.dropout, self.training)

    def mlp(self, x_BTH: Tensor) -> Tensor:
        """Return fc2(gelu(fc1(x)))."""
        return self.fc2(layers.gelu(self.fc1(x_BTH)))

    def forward_cached(self, x_BTH: Tensor, cache: Cache, layer: int) -> Tensor:
        """Run the block, which is ``layer`` of the cache, on new positions after those of the cache."""
        x_BTH = x_BTH + self.attention.forward_cached(self.norm1(x_BTH), cache, layer)
        return x_BTH + self.mlp(self.norm2(x_BTH))


class Position(nn.Embedding):  # type: ignore[misc]
    """Learned positions."""

    prefix = "position"

    def __init__(self, config: Config, topology: Topology) -> None:
        m = config.model
        super().__init__(m.positions, m.hidden, weight_attr=nn.initializer.Constant(0.0))
        self.topology = topology
        self.dropout = m.dropout

    def forward(self, x_BTH: Tensor) -> Tensor:
        """Add the positions to embedded tokens, with dropout; under sequence parallel return this rank's, TBH."""
        x_BTH = x_BTH + self.lookup(paddle.arange(x_BTH.shape[1], dtype="int64"))
        x_BTH = layers.dropout(x_BTH, self.dropout, self.training)
        return self.topology.scatter_to_sequence_parallel_region(x_BTH)

    def lookup(self, positions: Tensor) -> Tensor:
        """Return rows of the table."""
        return F.embedding(positions, self.weight)


class FinalNorm(layers.LayerNorm):
    """The LayerNorm before the head."""

    prefix = "norm"

    def __init__(self, config: Config, topology: Topology) -> None:
        super().__init__(config.model.hidden, config.model.layer_norm_eps)
        self.topology = topology

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; under sequence parallel gather the positions of all ranks."""
        return self.topology.gather_from_sequence_parallel_region(super().forward(x))


def word_embedding(config: Config, topology: Topology) -> nn.Layer:
    """Return the uninitialised word table, which the head is tied to."""
    return layers.embedding(topology, padded_vocab(config), config.model.hidden)


def initialise(config: Config, topology: Topology, parameters: dict[str, Tensor]) -> None:
    """Give parameters, by logical name, the initial values that the table states."""
    m = config.model
    for name, p in parameters.items():
        init = parameter(name).init
        if init is not Init.constant:
            scaled = init is Init.residual and m.scale_output_init
            std = m.init_std / math.sqrt(2 * m.layers) if scaled else m.init_std
            value = initial_value(config.seed, name, tensor_shards.global_shape(topology, p), std)
            p.set_value(tensor_shards.local_shard(topology, value, p))


class GPT(nn.Layer):  # type: ignore[misc]
    """The whole model, or this stage of a pipeline, which can only decode (``gpt.model.pipeline`` trains).

    Args:
        config: of the job; reads ``model``, ``parallel`` and ``seed``.
        topology: of this rank; gives the linears.
        on_built: called with each part as soon as it is built, and the prefix of its parameters' names; may free
            memory before the next part is built.
    """

    def __init__(self, config: Config, topology: Topology, on_built: OnBuilt = lambda prefix, part: None) -> None:
        super().__init__()
        m = config.model
        self.config = config
        self.topology = topology
        first, last = topology.stage == 0, topology.stage == topology.parallel.pp_degree - 1
        if first or last:
            self.word = word_embedding(config, topology)
            on_built("word", self.word)
        if first:
            self.position = Position(config, topology)
            on_built("position", self.position)
        if last:
            self.norm = FinalNorm(config, topology)
            on_built("norm", self.norm)
        self.layers = nn.LayerDict()
        for i in topology.stage_layers(m.layers):
            self.layers[str(i)] = Block(config, topology, i)
            on_built(f"layers.{i}", self.layers[str(i)])

    @property
    def dtype(self) -> str:
        """Return the element type of activations."""
        return str(next(iter(self.layers.values())).norm1.weight.dtype).removeprefix("paddle.")

    def logical_parameters(self) -> dict[str, Tensor]:
        """Return the parameters by the names of ``gpt.config.parameters``."""
        return dict(self.named_parameters())

    def initialise(self) -> None:
        """Give every parameter its initial value."""
        initialise(self.config, self.topology, self.logical_parameters())

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Return the final hidden states BTH of int64 tokens BT."""
        x = self.position(self.word(tokens_BT))
        for block in self.layers.values():
            x = block(x)
        return self.norm(x)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return the logits BTV; those of padding rows are -1e9."""
        assert self.topology.parallel.mp_degree == 1, "logits need the whole table: build the model for one rank"
        return layers.logits(self.hidden(tokens_BT), self.word.weight, self.config.model.vocab)

    def loss(self, tokens_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor, count: float) -> Tensor:
        """Return the sum of the cross entropies where ``mask_BT`` is 1, divided by ``count``: a float32 scalar.

        Args:
            tokens_BT: int64 inputs.
            labels_BT: int64, the inputs shifted by one.
            mask_BT: float32.
            count: counted positions of the whole global batch, so that micro batches add up to its mean.
        """
        m = self.config.model
        x_MH = self.hidden(tokens_BT).reshape([-1, m.hidden])
        labels_M, mask_M = labels_BT.flatten(), mask_BT.flatten() / count
        return layers.parallel_head_loss(self.topology, x_MH, self.word.weight, labels_M, mask_M, m.vocab, m.loss_chunk)

    def new_cache(self, columns: int, pads_B: Array) -> Cache:
        """Allocate a cache of ``columns`` positions for as many rows as ``pads_B`` has; see ``Cache``."""
        m, mp = self.config.model, self.topology.parallel.mp_degree
        self._fused = None
        if mp == self.topology.parallel.pp_degree == 1 and cpu_decode.fits(0, self.word.weight):
            self._fused = cpu_decode.FusedCpuDecoder(self.word.weight, self.position.weight, list(self.layers.values()))
        shape = [len(pads_B), m.heads // mp, columns, m.hidden // m.heads]
        return Cache(len(self.layers), shape, self.dtype, pads_B)

    def forward_cached(self, tokens_BT: Tensor, cache: Cache) -> Tensor:
        """Return the hidden states BTH of new tokens, on the last stage of a pipeline; append them to the cache.

        Args:
            tokens_BT: int64, the next columns of all rows.
            cache: of ``new_cache``, with room for T more columns.
        """
        B, T = tokens_BT.shape
        if self._fused and cpu_decode.fits(B * T, self.word.weight):
            x_BTH = self._fused.run(tokens_BT.numpy(), cache)
        else:
            x_BTH = self._forward_cached(tokens_BT, cache)
        cache.length += T
        return x_BTH

    def _forward_cached(self, tokens_BT: Tensor, cache: Cache) -> Tensor:
        if self.topology.stage > 0:
            x_BTH = paddle.empty([*tokens_BT.shape, self.config.model.hidden], self.dtype)
        else:
            x_BTH = self.word(tokens_BT) + self.position.lookup(paddle.to_tensor(cache.positions(tokens_BT.shape[1])))
        return pipeline_comm.pipeline_forward(self.topology, x_BTH, lambda x: self._run_blocks(x, cache))

    def decode(self, tokens_BT: Tensor, cache: Cache) -> Tensor:
        """Return the logits BV after the last of some new tokens, V the real vocabulary, on every rank.

        See ``forward_cached``.
        """
        x_BTH = self.forward_cached(tokens_BT, cache)
        shape = [tokens_BT.shape[0], self.config.model.vocab]
        return pipeline_comm.broadcast_from_last_stage(
            self.topology, shape, self.dtype, lambda: self._head(x_BTH[:, -1])
        )

    def _run_blocks(self, x_BTH: Tensor, cache: Cache) -> Tensor:
        for i, block in enumerate(self.layers.values()):
            x_BTH = block.forward_cached(x_BTH, cache, i)
        return x_BTH

    def _head(self, x_BH: Tensor) -> Tensor:
        return layers.head(self.topology, self.norm(x_BH), self.word.weight, self.config.model.vocab)
