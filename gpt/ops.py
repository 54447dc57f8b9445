"""Operations written for what a CPU is slow at; on other devices Paddle's own kernels.

B batch, T positions, N heads, D head size, E = 3 D.
"""

from __future__ import annotations

import paddle
from paddle import Tensor
from paddle.nn import functional as F


def causal_attention(qkv_BTNE: Tensor, dropout: float) -> Tensor:
    """softmax(q k' / sqrt(D)) v over the positions up to one's own, with dropout on the probabilities: BTND."""
    q, k, v = paddle.split(qkv_BTNE, 3, axis=-1)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def attention_after(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Tensor:
    """Attention of the last T of S positions to all up to their own, for decoding: BTND."""
    T, S = q_BTND.shape[1], k_BSND.shape[1]
    q, k, v = (x.transpose([0, 2, 1, 3]) for x in (q_BTND, k_BSND, v_BSND))
    scores_BNTS = paddle.matmul(q * q.shape[-1] ** -0.5, k, transpose_y=True)
    if T > 1:
        hidden_TS = paddle.triu(paddle.full([T, S], -1e9, dtype=scores_BNTS.dtype), diagonal=S - T + 1)
        scores_BNTS = scores_BNTS + hidden_TS
    return paddle.matmul(F.softmax(scores_BNTS, axis=-1), v).transpose([0, 2, 1, 3])


def gelu(x: Tensor) -> Tensor:
    """GELU, tanh approximation."""
    return F.gelu(x, approximate=True)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout with scaling by 1 / (1 - p) in training; the identity otherwise."""
    return F.dropout(x, p, training=training) if p > 0 and training else x
