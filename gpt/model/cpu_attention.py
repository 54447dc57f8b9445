"""Causal attention, and the head with its loss: the two large kernels. See ``gpt.model.cpu_kernels``.

B batch, T positions, N heads, D head size, E = 3 D, M = B T rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from gpt.model.cpu_kernels import QUERY_BLOCK, draw_seed, keep_mask, over_rows, tiles
from gpt.utils.arrays import Array, view

LOSS_TILE_ROWS = 8  # of a vocabulary of 50,000: 1.6 MB


class CausalAttention(PyLayer):  # type: ignore[misc]
    """softmax(q k' / sqrt(D)) v in blocks of queries; above the diagonal only the block on it is computed.

    The exponentials are kept as they are: a row's sum divides the D columns of its output and gradient instead of
    its up to T columns of probabilities. The gradient is FlashAttention's (Dao et al., 2022, appendix B.2).
    """

    @staticmethod
    def forward(ctx: Any, qkv_BTNE: Tensor, dropout: float) -> Tensor:
        """Return BTND."""
        B, T, N, E = qkv_BTNE.shape
        D = E // 3
        packed = _unpack(view(qkv_BTNE.contiguous()).reshape(B, T, N, 3, D))
        q, k, v = packed[0], packed[1], packed[2]
        out = paddle.empty([B, T, N, D], qkv_BTNE.dtype)
        o_BTND = view(out)
        inverse = np.empty((B * N, T, 1), dtype=np.float32)
        seed = draw_seed() if dropout else 0
        blocks: list[tuple[Tensor, Array | None]] = []
        for s in tiles(0, T, QUERY_BLOCK):
            exps = paddle.matmul(q[:, s], k[:, : s.stop], transpose_y=True)
            mask, scale = keep_mask(exps.shape, dropout, seed, s.start) if dropout else (None, np.float32(1))
            kept = _softmax_rows(exps, s, mask, scale, inverse)
            mixed = view(paddle.matmul(kept, v[:, : s.stop]))
            mixed *= inverse[:, s]
            o_BTND[:, s] = mixed.reshape(B, N, -1, D).transpose(0, 2, 1, 3)
            blocks.append((exps, mask))
        ctx.saved = (packed, blocks, inverse, scale, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad_BTND: Tensor) -> Tensor:
        """Return BTNE."""
        packed, blocks, inverse, scale, out = ctx.saved
        ctx.saved = None
        B, T, N, _ = out.shape
        q, k, v = packed[0], packed[1], packed[2]
        grad_out, along = _scaled_gradient(grad_BTND, out, inverse, scale)
        grads = paddle.empty(packed.shape, packed.dtype)
        dq, dk, dv = view(grads)
        dk[...] = dv[...] = 0
        for s in reversed(tiles(0, T, QUERY_BLOCK)):
            exps, mask = blocks.pop()
            block_grad = grad_out[:, s]
            grad_scores = paddle.matmul(block_grad, v[:, : s.stop], transpose_y=True)
            kept = _softmax_gradient(exps, grad_scores, mask, along[:, s])
            dq[:, s] = view(paddle.matmul(grad_scores, k[:, : s.stop]))
            dk[:, : s.stop] += view(paddle.matmul(grad_scores, q[:, s], transpose_x=True))
            dv[:, : s.stop] += view(paddle.matmul(kept, block_grad, transpose_x=True))
        return _pack(view(grads), B, N)


def _unpack(qkv_BTN3D: Array) -> Tensor:
    """Return [3, B N, T, D], the queries already divided by sqrt(D)."""
    B, T, N, _, D = qkv_BTN3D.shape
    packed = paddle.empty([3, B * N, T, D], "float32")
    to = view(packed).reshape(3, B, N, T, D)

    def work(first: int, last: int) -> None:
        rows = qkv_BTN3D[:, first:last].transpose(3, 0, 2, 1, 4)
        np.multiply(rows[0], np.float32(1 / math.sqrt(D)), out=to[0, :, :, first:last])
        to[1:, :, :, first:last] = rows[1:]

    over_rows(work, T)
    return packed


def _pack(grads: Array, B: int, N: int) -> Tensor:
    """Invert ``_unpack`` for gradients."""
    T, D = grads.shape[2:]
    packed = paddle.empty([B, T, N, 3 * D], "float32")
    to = view(packed).reshape(B, T, N, 3, D)
    split = grads.reshape(3, B, N, T, D)

    def work(first: int, last: int) -> None:
        rows = split[:, :, :, first:last].transpose(1, 3, 2, 0, 4)
        np.multiply(rows[:, :, :, 0], np.float32(1 / math.sqrt(D)), out=to[:, first:last, :, 0])
        to[:, first:last, :, 1:] = rows[:, :, :, 1:]

    over_rows(work, T)
    return packed


def _softmax_rows(scores: Tensor, s: slice, mask: Array | None, scale: np.float32, inverse: Array) -> Tensor:
    """Turn scores into exponentials in place; return those that dropout keeps. ``inverse`` gets scale / sum."""
    kept = scores if mask is None else paddle.empty(scores.shape, scores.dtype)
    exps, keep = view(scores), view(kept)
    future = np.triu(np.full((s.stop - s.start,) * 2, -np.inf, dtype=np.float32), 1)

    def work(first: int, last: int) -> None:
        for head in range(first, last):  # one at a time: it stays in cache
            x = exps[head]
            x[:, s.start :] += future
            x -= x.max(-1, keepdims=True)
            np.exp(x, out=x)
            np.divide(scale, x.sum(-1, keepdims=True), out=inverse[head, s])
            if mask is not None:
                np.multiply(x, mask[head], out=keep[head])

    over_rows(work, exps.shape[0])
    return kept


def _scaled_gradient(grad_BTND: Tensor, out_BTND: Tensor, inverse: Array, scale: np.float32) -> tuple[Tensor, Array]:
    """Return the gradient over the row sums, [B N, T, D], and the row sums of gradient times output, so scaled."""
    B, T, N, D = out_BTND.shape
    scaled = paddle.empty([B * N, T, D], "float32")
    along = np.empty((B, N, T), dtype=np.float32)
    to, g, o = view(scaled).reshape(B, N, T, D), view(grad_BTND.contiguous()), view(out_BTND)
    inv = inverse.reshape(B, N, T)

    def work(first: int, last: int) -> None:
        part = slice(first, last)
        np.multiply(g[:, part].transpose(0, 2, 1, 3), inv[:, :, part, None], out=to[:, :, part])
        along[:, :, part] = np.einsum("btnd,btnd->bnt", g[:, part], o[:, part]) * inv[:, :, part] / scale

    over_rows(work, T)
    return scaled, along.reshape(B * N, T, 1)


def _softmax_gradient(exps: Tensor, grads: Tensor, mask: Array | None, along: Array) -> Tensor:
    """Turn gradients of kept probabilities into gradients of scores in place; return the kept exponentials."""
    kept = exps if mask is None else paddle.empty(exps.shape, exps.dtype)
    e, g, keep = view(exps), view(grads), view(kept)

    def work(first: int, last: int) -> None:
        for head in range(first, last):
            if mask is not None:
                np.multiply(e[head], mask[head], out=keep[head])
                g[head] *= mask[head]
            g[head] -= along[head]
            g[head] *= e[head]

    over_rows(work, e.shape[0])
    return kept


class HeadLoss(PyLayer):  # type: ignore[misc]
    """Weighted sum of cross entropies of softmax(x w'), some rows at a time.

    Gradients are made in the forward pass, over the logits, so at most ``chunk`` rows of logits ever exist and
    nothing is computed twice (as in Liger kernels, Hsu et al., 2024).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_MH: Tensor,
        table_VH: Tensor,
        labels_M: Tensor,
        weight_M: Tensor,
        vocab: int,
        chunk: int,
        backward: bool,
    ) -> Tensor:
        """Return a scalar; rows of ``table_VH`` from ``vocab`` on are padding and take no part.

        ``backward`` says whether gradients are wanted; in here they are always off.
        """
        labels, weight = view(labels_M), view(weight_M)
        losses = np.empty(len(labels), dtype=np.float32)
        grad_x, grad_table = [], None
        for s in tiles(0, len(labels), chunk):
            logits = paddle.matmul(x_MH[s], table_VH, transpose_y=True)
            _cross_entropy(view(logits), labels[s], weight[s], vocab, losses[s])
            if backward:
                grad_x.append(paddle.matmul(logits, table_VH))
                part = paddle.matmul(logits, x_MH[s], transpose_x=True)
                grad_table = part if grad_table is None else grad_table.add_(part)
        if backward:
            ctx.save_for_backward(paddle.concat(grad_x) if len(grad_x) > 1 else grad_x[0], grad_table)
        return paddle.to_tensor(np.dot(losses.astype(np.float64), weight).astype(np.float32))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Return the gradients of the forward pass times the incoming scalar."""
        grad_x, grad_table = ctx.saved_tensor()
        factor = grad.item()
        if factor != 1.0:
            grad_x, grad_table = grad_x * factor, grad_table * factor
        return grad_x, grad_table, None, None


def _cross_entropy(logits_MV: Array, labels_M: Array, weight_M: Array, vocab: int, losses_M: Array) -> None:
    """Put the losses into ``losses_M`` and their weighted gradients over the logits."""

    def work(first: int, last: int) -> None:
        for s in tiles(first, last, LOSS_TILE_ROWS):
            z, row = logits_MV[s, :vocab], np.arange(s.stop - s.start)
            z -= z.max(-1, keepdims=True)
            label_logit = z[row, labels_M[s]].copy()
            np.exp(z, out=z)
            total = z.sum(-1)
            losses_M[s] = np.log(total) - label_logit
            z *= (weight_M[s] / total)[:, None]
            z[row, labels_M[s]] -= weight_M[s]
            logits_MV[s, vocab:] = 0

    over_rows(work, len(labels_M))
