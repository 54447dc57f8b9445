"""What decoding does a few rows at a time, on a CPU: see ``gpt.kernels``.

B batch, T new positions, N heads, D head size, S columns of the cache.
"""

from __future__ import annotations

import math

import numpy as np
import paddle
from paddle import Tensor

from gpt.data.tokens import Array
from gpt.kernels import view

MASKED = np.float32(-1e30)  # finite: a column of padding may look at nothing but padding


def attention(qkv_BTNE: Tensor, keys_BNSD: Tensor, values_BNSD: Tensor, start: int, pads_B: Array) -> Tensor:
    """``gpt.ops.attention_after`` on Paddle's memory."""
    B, T, N, E = qkv_BTNE.shape
    D, stop = E // 3, start + T
    qkv = view(qkv_BTNE.contiguous()).reshape(B, T, N, 3, D).transpose(3, 0, 2, 1, 4)
    keys, values = view(keys_BNSD), view(values_BNSD)
    keys[:, :, start:stop], values[:, :, start:stop] = qkv[1], qkv[2]
    scores = np.matmul(qkv[0] * np.float32(1 / math.sqrt(D)), keys[:, :, :stop].swapaxes(-1, -2))
    if T > 1:
        scores[..., start:] += np.triu(np.full((T, T), MASKED, dtype=np.float32), 1)
    for row in np.flatnonzero(pads_B):
        scores[row, :, :, : pads_B[row]] = MASKED
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    mixed = np.matmul(scores, values[:, :, :stop])
    mixed /= scores.sum(-1, keepdims=True)
    out = paddle.empty([B, T, N, D], qkv_BTNE.dtype)
    view(out)[...] = mixed.transpose(0, 2, 1, 3)
    return out
