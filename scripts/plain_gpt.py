"""A GPT in plain Paddle, the way the predecessor's single-card model is written: the baseline of ``bench_train.py``.

Fused qkv, the whole T x T score matrix with an additive mask, softmax, and Paddle's own dropout, GELU, LayerNorm, loss,
clip and AdamW. Shapes: B batch, T positions, H hidden, N heads, D head size, V vocabulary.
"""

from __future__ import annotations

import math

import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F

from gpt.config.schema import Config


class PlainBlock(nn.Layer):  # type: ignore[misc]
    """Pre-LN attention and MLP."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        m = config.model
        self.heads, self.dropout, self.attention_dropout = m.heads, m.dropout, m.attention_dropout
        self.norm1, self.norm2 = nn.LayerNorm(m.hidden), nn.LayerNorm(m.hidden)
        self.qkv, self.out = nn.Linear(m.hidden, 3 * m.hidden), nn.Linear(m.hidden, m.hidden)
        self.fc1, self.fc2 = nn.Linear(m.hidden, m.ffn), nn.Linear(m.ffn, m.hidden)

    def forward(self, x_BTH: Tensor, mask_TT: Tensor) -> Tensor:
        """BTH to BTH."""
        B, T, H = x_BTH.shape
        qkv = self.qkv(self.norm1(x_BTH)).reshape([B, T, self.heads, -1]).transpose([0, 2, 1, 3])
        q, k, v = paddle.split(qkv, 3, axis=-1)
        scores = paddle.matmul(q * (1 / math.sqrt(H // self.heads)), k, transpose_y=True) + mask_TT
        weights = F.dropout(F.softmax(scores, axis=-1), self.attention_dropout, training=self.training)
        mixed = paddle.matmul(weights, v).transpose([0, 2, 1, 3]).reshape([B, T, H])
        x_BTH = x_BTH + F.dropout(self.out(mixed), self.dropout, training=self.training)
        inner = F.gelu(self.fc1(self.norm2(x_BTH)), approximate=True)
        return x_BTH + F.dropout(self.fc2(inner), self.dropout, training=self.training)


class PlainGPT(nn.Layer):  # type: ignore[misc]
    """Embeddings, blocks, tied head, masked mean loss."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        m = config.model
        normal = nn.initializer.Normal(0.0, m.init_std)
        self.dropout = m.dropout
        self.word = nn.Embedding(m.vocab, m.hidden, weight_attr=normal)
        self.position = nn.Embedding(m.positions, m.hidden, weight_attr=normal)
        self.blocks = nn.LayerList([PlainBlock(config) for _ in range(m.layers)])
        self.norm = nn.LayerNorm(m.hidden)

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The loss."""
        T = tokens_BT.shape[1]
        causal_TT = paddle.triu(paddle.full([T, T], -1e4), 1)
        x = self.word(tokens_BT) + self.position(paddle.arange(T))
        x = F.dropout(x, self.dropout, training=self.training)
        for block in self.blocks:
            x = block(x, causal_TT)
        logits = paddle.matmul(self.norm(x), self.word.weight, transpose_y=True)
        each = F.cross_entropy(logits, labels_BT.unsqueeze(-1), reduction="none").squeeze(-1)
        return (each * mask_BT).sum() / mask_BT.sum()


class PlainTrainer:
    """Model, clip and optimizer, stepped on a given batch."""

    def __init__(self, config: Config) -> None:
        self.model = PlainGPT(config)
        decayed = {p.name for n, p in self.model.named_parameters() if "bias" not in n and "norm" not in n}
        self.optimizer = paddle.optimizer.AdamW(
            learning_rate=config.optimizer.lr,
            parameters=self.model.parameters(),
            weight_decay=config.optimizer.weight_decay,
            grad_clip=nn.ClipGradByGlobalNorm(1.0),
            apply_decay_param_fun=decayed.__contains__,
        )

    def step(self, tokens_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor) -> float:
        """One update; returns the loss."""
        loss = self.model(tokens_BT, labels_BT, mask_BT)
        loss.backward()
        self.optimizer.step()
        self.optimizer.clear_grad()
        return float(loss.item())
