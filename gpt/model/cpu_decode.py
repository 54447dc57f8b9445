"""Decoding of a few rows on a CPU: see ``gpt.model.cpu_kernels``.

A single new token of a row passes a block in 1 ms or less, of which calls to Paddle would be two thirds; so between
the matrix products this is numpy on Paddle's memory, and for a single row the products too.

B batch, T new positions, M = B T rows, N heads, D head size, H = N D hidden, F ffn, S columns of the cache.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from gpt.model.cpu_kernels import VECTOR_ROWS, Gelu
from gpt.model.kv_cache import Cache
from gpt.utils.arrays import Array, view

FEW_ELEMENTS = 1 << 15  # that one thread is done with before another would be awake
MASKED = np.float32(-1e30)  # finite: a column of padding may look at nothing but padding


def attention(qkv_BTNE: Tensor, keys_BNSD: Tensor, values_BNSD: Tensor, start: int, pads_B: Array) -> Tensor:
    """Compute ``gpt.model.layers.attention_after`` on Paddle's memory."""
    B, T, N, E = qkv_BTNE.shape
    out = paddle.empty([B, T, N, E // 3], qkv_BTNE.dtype)
    qkv = view(qkv_BTNE.contiguous()).reshape(B, T, N, 3, E // 3)
    _attend(qkv, view(keys_BNSD), view(values_BNSD), start, pads_B, view(out))
    return out


def _attend(qkv_BTN3D: Array, keys: Array, values: Array, start: int, pads_B: Array, out_BTND: Array) -> None:
    """Put the new keys and values into the cache, and the attention over it into ``out_BTND``."""
    T, D, stop = qkv_BTN3D.shape[1], qkv_BTN3D.shape[-1], start + qkv_BTN3D.shape[1]
    qkv = qkv_BTN3D.transpose(3, 0, 2, 1, 4)
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
    out_BTND[...] = mixed.transpose(0, 2, 1, 3)


def fits(rows: int, table: Tensor) -> bool:
    """Return whether the fused CPU decode path supports this batch: on a CPU, in float32, few elements."""
    few = rows * table.shape[1] <= FEW_ELEMENTS
    return few and bool(table.place.is_cpu_place()) and table.dtype == paddle.float32


class FusedCpuDecoder:
    """A model of one rank, up to its last block, on a few rows.

    Args:
        word: the table.
        position: the table of the positions.
        blocks: of ``gpt.model.gpt``; all on the CPU, in float32, and they must not change while this is used.
    """

    def __init__(self, word: Tensor, position: Tensor, blocks: list[Any]) -> None:
        self._word, self._position = view(word), view(position)
        self._blocks = [{name: (p, view(p)) for name, p in block.named_parameters()} for block in blocks]
        self._heads = blocks[0].attention.heads
        self._eps = np.float32(blocks[0].norm1.epsilon)

    def run(self, tokens_BT: Array, cache: Cache) -> Tensor:
        """Return hidden states BTH of the tokens, as of the embedding and ``Block.forward_cached`` of each block."""
        B, T = tokens_BT.shape
        out = paddle.empty([B, T, self._word.shape[1]], "float32")
        x = view(out).reshape(B * T, -1)
        np.add(self._word[tokens_BT.ravel()], self._position[cache.positions(T).ravel()], out=x)
        normed, mixed = paddle.empty(x.shape, "float32"), paddle.empty(x.shape, "float32")
        n, m = view(normed), view(mixed)
        m_BTND = m.reshape(B, T, self._heads, -1)
        for i, p in enumerate(self._blocks):
            self._norm(x, p, "norm1", n)
            _, qkv = _linear(normed, n, p, "attention.qkv")
            keys, values = view(cache.keys[i]), view(cache.values[i])
            _attend(qkv.reshape(B, T, self._heads, 3, -1), keys, values, cache.length, cache.pads_B, m_BTND)
            x += _linear(mixed, m, p, "attention.out")[1]
            self._norm(x, p, "norm2", n)
            inner, f = _linear(normed, n, p, "fc1")
            Gelu.in_place(f)
            x += _linear(inner, f, p, "fc2")[1]
        return out

    def _norm(self, x: Array, p: dict[str, tuple[Tensor, Array]], name: str, out: Array) -> None:
        """Apply LayerNorm over the last axis."""
        H = np.float32(x.shape[-1])
        np.subtract(x, x.sum(-1, keepdims=True) / H, out=out)
        out *= (1 / np.sqrt(np.einsum("mh,mh->m", out, out) / H + self._eps))[:, None]
        out *= p[f"{name}.weight"][1]
        out += p[f"{name}.bias"][1]


def _linear(
    x: Tensor | None, rows: Array, p: dict[str, tuple[Tensor, Array]], name: str
) -> tuple[Tensor | None, Array]:
    """Return x w + b and its memory; ``rows`` is that of ``x``. One row needs no tensor (``cpu_kernels.product``)."""
    weight, w = p[f"{name}.weight"]
    out = paddle.matmul(x, weight) if rows.shape[0] > VECTOR_ROWS else None
    o = rows @ w if out is None else view(out)
    o += p[f"{name}.bias"][1]
    return out, o
