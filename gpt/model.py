"""The GPT: pre-LN blocks, tanh-GELU, learned positions, head tied to the embedding.

Shapes are in names: B batch, T positions, H hidden, N heads, D head size (H = N D), F ffn, V vocabulary.
The maths is GPT-2's (Radford et al., 2019). The columns of the fused qkv belong together by head (q_j k_j v_j),
so that a split of the columns is a split of the heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import paddle
from paddle import Tensor, nn
from paddle.distributed.fleet.utils import recompute

from gpt import ops
from gpt.config import Config, Recompute, padded_vocab
from gpt.topology import Topology, initial_value

Settle = Callable[[str, nn.Layer], None]
Cache = list[tuple[Tensor, Tensor]]  # per layer: keys and values so far, BTND each


class Attention(nn.Layer):  # type: ignore[misc]
    """Causal self-attention with fused projections."""

    def __init__(self, config: Config, topology: Topology, recompute_core: bool) -> None:
        super().__init__()
        m = config.model
        self.heads = m.heads // topology.parallel.mp_degree
        self.size = m.hidden // m.heads
        self.dropout = m.attention_dropout
        self.topology = topology
        self.recompute_core = recompute_core
        self.qkv = topology.column_linear(m.hidden, 3 * m.hidden)
        self.out = topology.row_linear(m.hidden, m.hidden)

    def forward(self, x_BTH: Tensor) -> Tensor:
        """Attend to all earlier positions; returns BTH before the residual sum (see ``Topology.turned``)."""
        qkv_BTE = self.topology.turned(self.qkv(x_BTH))
        B, T, _ = qkv_BTE.shape
        qkv_BTNE = qkv_BTE.reshape([B, T, self.heads, 3 * self.size])
        dropout = self.dropout if self.training else 0.0
        if self.recompute_core and self.training:
            mixed_BTND = recompute(self._mix, qkv_BTNE, dropout)
        else:
            mixed_BTND = self._mix(qkv_BTNE, dropout)
        return self.out(self.topology.turned(mixed_BTND.reshape([B, T, self.heads * self.size])))

    def _mix(self, qkv_BTNE: Tensor, dropout: float) -> Tensor:
        with self.topology.own_masks():
            return ops.causal_attention(qkv_BTNE, dropout)

    def step(self, x_BTH: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The same for new positions after ``past`` ones, without dropout; returns the longer past too."""
        B, T, _ = x_BTH.shape
        qkv_BTNE = self.qkv(x_BTH).reshape([B, T, self.heads, 3 * self.size])
        q, k, v = paddle.split(qkv_BTNE, 3, axis=-1)
        if past is not None:
            k, v = paddle.concat([past[0], k], axis=1), paddle.concat([past[1], v], axis=1)
        mixed_BTND = ops.attention_after(q, k, v)
        return self.out(mixed_BTND.reshape([B, T, self.heads * self.size])), (k, v)


class Block(nn.Layer):  # type: ignore[misc]
    """x + attention(norm(x)), then x + mlp(norm(x)), each branch with dropout at its end."""

    def __init__(self, config: Config, topology: Topology, number: int) -> None:
        super().__init__()
        m = config.model
        self.number = number
        exempt = number in m.no_recompute_layers
        self.recompute = Recompute.none if exempt else m.recompute
        self.dropout = m.dropout
        self.topology = topology
        self.norm1 = ops.LayerNorm(m.hidden, m.layer_norm_eps)
        self.attention = Attention(config, topology, self.recompute is Recompute.core_attn)
        self.norm2 = ops.LayerNorm(m.hidden, m.layer_norm_eps)
        self.fc1 = topology.column_linear(m.hidden, m.ffn)
        self.fc2 = topology.row_linear(m.ffn, m.hidden)

    def forward(self, x_BTH: Tensor) -> Tensor:
        """One block on BTH, recomputed in the backward pass as configured."""
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
        with self.topology.branch_masks():
            x_BTH = x_BTH + ops.dropout(mixed, self.dropout, self.training)
        branch = self._mlp(self.norm2(x_BTH))
        with self.topology.branch_masks():
            return x_BTH + ops.dropout(branch, self.dropout, self.training)

    def _mlp(self, x_BTH: Tensor) -> Tensor:
        return self.fc2(ops.gelu(self.fc1(x_BTH)))

    def step(self, x_BTH: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Inference on new positions after ``past`` ones."""
        mixed, past = self.attention.step(self.norm1(x_BTH), past)
        x_BTH = x_BTH + mixed
        return x_BTH + self._mlp(self.norm2(x_BTH)), past


def initialise(config: Config, topology: Topology, parameters: dict[str, Tensor]) -> None:
    """Matrices and tables N(0, init_std), projections into the residual stream as configured, the rest as is."""
    m = config.model
    for name, p in parameters.items():
        if name.endswith(".weight") and ".norm" not in f".{name}":
            into_residual = name.endswith((".out.weight", ".fc2.weight")) and m.scale_output_init
            std = m.init_std / math.sqrt(2 * m.layers) if into_residual else m.init_std
            p.set_value(topology.part(initial_value(config.seed, name, topology.whole_shape(p), std), p))


class GPT(nn.Layer):  # type: ignore[misc]
    """The whole model.

    Args:
        config: of the job; reads ``model``, ``parallel`` and ``seed``.
        topology: of this rank; gives the linears.
        settle: told of each part as soon as it is made, with the prefix of its names: what need not stay here can go
            before the next part comes.
    """

    def __init__(self, config: Config, topology: Topology, settle: Settle = lambda prefix, part: None) -> None:
        super().__init__()
        m = config.model
        self.config = config
        self.topology = topology
        self.word = topology.embedding(padded_vocab(config), m.hidden)
        self.position = nn.Embedding(m.positions, m.hidden, weight_attr=nn.initializer.Constant(0.0))
        self.norm = ops.LayerNorm(m.hidden, m.layer_norm_eps)
        for prefix, part in (("word", self.word), ("position", self.position), ("norm", self.norm)):
            settle(prefix, part)
        self.layers = nn.LayerList()
        for i in range(m.layers):
            block = Block(config, topology, i)
            settle(f"layers.{i}", block)
            self.layers.append(block)

    def logical_parameters(self) -> dict[str, Tensor]:
        """Parameters by the names that checkpoints, initial values and decay rules use."""
        return dict(self.named_parameters())

    def initialise(self) -> None:
        """Give every parameter its first value."""
        initialise(self.config, self.topology, self.logical_parameters())

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Final hidden states BTH of int64 tokens BT."""
        x_BTH = self.topology.enter_blocks(self._embed(tokens_BT, 0))
        for block in self.layers:
            x_BTH = block(x_BTH)
        return self.topology.leave_blocks(self.norm(x_BTH))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits BTV; those of padding rows are -1e9."""
        return self._head(self.hidden(tokens_BT))

    def loss(self, tokens_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor, count: float) -> Tensor:
        """Sum of the cross entropies where ``mask_BT`` is 1, divided by ``count``: a scalar, in float32.

        Args:
            tokens_BT: int64 inputs.
            labels_BT: int64, the inputs shifted by one.
            mask_BT: float32.
            count: counted positions of the whole global batch, so that micro batches add up to its mean.
        """
        x_MH = self.hidden(tokens_BT).reshape([-1, self.config.model.hidden])
        labels_M, mask_M = labels_BT.flatten(), mask_BT.flatten() / count
        m = self.config.model
        return self.topology.head_loss(x_MH, self.word.weight, labels_M, mask_M, m.vocab, m.loss_chunk)

    def _head(self, x: Tensor) -> Tensor:
        assert self.topology.parallel.mp_degree == 1, "logits want the whole table: build the model for one rank"
        return ops.logits(x, self.word.weight, self.config.model.vocab)

    def _embed(self, tokens_BT: Tensor, start: int) -> Tensor:
        positions_T = paddle.arange(start, start + tokens_BT.shape[1], dtype="int64")
        x_BTH = self.word(tokens_BT) + self.position(positions_T)
        return ops.dropout(x_BTH, self.config.model.dropout, self.training)

    def step(self, tokens_BT: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Logits BV after the last of some new tokens, and the longer cache: incremental decoding.

        Args:
            tokens_BT: the new tokens; the whole prompt with ``cache`` None.
            cache: of the former call; it grows by T positions.
        """
        x_BTH = self._embed(tokens_BT, cache[0][0].shape[1] if cache else 0)
        longer: Cache = []
        for i, block in enumerate(self.layers):
            x_BTH, past = block.step(x_BTH, cache[i] if cache else None)
            longer.append(past)
        return self._head(self.norm(x_BTH[:, -1])), longer
