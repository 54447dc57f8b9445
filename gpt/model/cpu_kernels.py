"""Forward and backward passes of operations that are slow in Paddle 3.3 on a CPU, in numpy, on Paddle's memory.

Matrix products stay Paddle's. Between them lie passes over memory: Paddle runs most on one thread, some through
slow paths (a bias gradient is a column sum 40 times slower than a product with ones, dropout draws 10 ns an
element). Here each pass runs over rows on all cores (numpy lets go of the GIL), in tiles that stay in cache, in place
where it can. ``tests/test_model.py`` holds every kernel against its plain formula; ``docs/benchmarks.md`` has the gain.

All tensors are float32. M rows, B batch, T positions, N heads, D head size, V vocabulary.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from gpt.utils.arrays import Array, view

THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
QUERY_BLOCK = 256  # rows of the attention matrix at once; what is right of their diagonal block is never computed
TILE_ROWS = 32  # of some thousand columns: fits a core's second-level cache
FEW_ROWS = 16  # of some thousand columns
VECTOR_ROWS = 1  # up to here numpy's product of a row and a matrix reads memory faster than Paddle's
FLAT_TILE = 1 << 15  # elements of a flat array at once
RANDOM_BITS = 16  # of a dropout decision
_pool = ThreadPoolExecutor(max(1, THREADS - 1), thread_name_prefix="kernels")


def over_rows(work: Callable[[int, int], None], rows: int, few: int = 0) -> None:
    """Call ``work(first, last)`` on parts of range(rows), one per thread; the result must not depend on the cut.

    Below ``few`` rows the work is done before another thread would be awake.
    """

    def quietly(first: int, last: int) -> None:
        with np.errstate(all="ignore"):  # infinities and NaN travel on to the guard, as they do in Paddle
            work(first, last)

    if rows < few:
        quietly(0, rows)
        return
    cuts = [rows * i // THREADS for i in range(THREADS + 1)]
    others = [_pool.submit(quietly, cuts[i], cuts[i + 1]) for i in range(THREADS - 1)]
    quietly(cuts[-2], cuts[-1])
    for other in others:
        other.result()


def tiles(first: int, last: int, rows: int = TILE_ROWS) -> list[slice]:
    """Cut range(first, last) into pieces of ``rows``."""
    return [slice(i, min(i + rows, last)) for i in range(first, last, rows)]


def sum_of_squares(tensor: Tensor) -> float:
    """Sum in blocks that are added up in float64; Paddle's ``dot`` of 262,144 float32 squares is off by 6e-5."""
    flat = view(tensor.contiguous()).reshape(-1)
    parts = tiles(0, flat.size, FLAT_TILE)
    sums = np.empty(len(parts), dtype=np.float64)

    def work(first: int, last: int) -> None:
        for i in range(first, last):
            sums[i] = np.dot(flat[parts[i]], flat[parts[i]])

    over_rows(work, len(parts))
    return float(sums.sum())


def draw_seed() -> int:
    """Draw a seed from Paddle's generator: it follows ``paddle.seed``, and recompute draws the same one again."""
    high, low = paddle.randint(0, 2**31 - 1, [2], dtype="int64").numpy()
    return int(high) << 31 | int(low)


def keep_mask(shape: list[int], p: float, *seeds: int) -> tuple[Array, np.float32]:
    """Return the mask of kept elements and their scale: a function of the arguments only, not of the threads.

    ``p`` is rounded to a multiple of 2^-16 and the scale is that of the rounded value, so the mean is exact.
    """
    count = math.prod(shape)
    threshold = round(p * (1 << RANDOM_BITS))
    keep = np.empty(count, dtype=np.bool_)
    half = -(-count // 8) * 4  # two streams whatever the number of threads; each word of 64 bits decides on four

    def work(first: int, last: int) -> None:
        for stream in range(first, last):
            begin, end = stream * half, min((stream + 1) * half, count)
            if end > begin:
                words = np.random.SFC64([*seeds, stream]).random_raw(-(-(end - begin) // 4))
                np.greater_equal(words.view(np.uint16)[: end - begin], threshold, out=keep[begin:end])

    over_rows(work, 2)
    return keep.reshape(shape), np.float32(1 / (1 - threshold / (1 << RANDOM_BITS)))


class NoGradContext:
    """The context of a kernel that will have no gradient."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keep nothing."""


class Dropout(PyLayer):  # type: ignore[misc]
    """x times mask over 1 - p; one byte per element is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        """Any shape."""
        ctx.mask, ctx.scale = keep_mask(x.shape, p, draw_seed())
        return _masked(x, ctx.mask, ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Apply the mask to the gradient."""
        return _masked(grad, ctx.mask, ctx.scale)


def _masked(x: Tensor, mask: Array, scale: np.float32) -> Tensor:
    out = paddle.empty(x.shape, x.dtype)
    a, b, keep = view(x.contiguous()).reshape(-1), view(out).reshape(-1), mask.reshape(-1)

    def work(first: int, last: int) -> None:
        for s in tiles(first, last, FLAT_TILE):
            np.multiply(a[s], keep[s], out=b[s])
            b[s] *= scale

    over_rows(work, a.size)
    return out


def product(x_MH: Tensor, weight: Tensor, *, transposed: bool = False) -> Tensor:
    """Return x w or x w'. A single row is bound by reading ``weight``, where numpy's BLAS is 1.5 times as fast."""
    if x_MH.shape[0] > VECTOR_ROWS:
        return paddle.matmul(x_MH, weight, transpose_y=transposed)
    w = view(weight).T if transposed else view(weight)
    out = paddle.empty([x_MH.shape[0], w.shape[1]], x_MH.dtype)
    np.matmul(view(x_MH.contiguous()), w, out=view(out))
    return out


class Linear(PyLayer):  # type: ignore[misc]
    """x w + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """``x`` [..., in], ``weight`` [in, out], ``bias`` [out]; returns [..., out]."""
        ctx.save_for_backward(x, weight)
        out = product(x.reshape([-1, x.shape[-1]]), weight)
        o, b = view(out), view(bias)

        def work(first: int, last: int) -> None:
            o[first:last] += b

        over_rows(work, out.shape[0], FEW_ROWS)
        return out.reshape([*x.shape[:-1], weight.shape[1]])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients; the bias gradient is a product with a row of ones."""
        x, weight = ctx.saved_tensor()
        g, rows = grad.reshape([-1, weight.shape[1]]), x.reshape([-1, weight.shape[0]])
        grad_x = paddle.matmul(g, weight, transpose_y=True).reshape(x.shape)
        return grad_x, paddle.matmul(rows, g, transpose_x=True), _column_sum(g)


def _column_sum(x_MH: Tensor) -> Tensor:
    return paddle.matmul(paddle.ones([1, x_MH.shape[0]]), x_MH).reshape([-1])


class Gelu(PyLayer):  # type: ignore[misc]
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (Hendrycks and Gimpel, 2016)."""

    SLOPE = np.float32(math.sqrt(2 / math.pi))
    CUBIC = np.float32(0.044715 * math.sqrt(2 / math.pi))

    @staticmethod
    def tanh(x: Array, out: Array) -> None:
        """Return the tanh of the formula."""
        np.multiply(x, x, out=out)
        out *= Gelu.CUBIC
        out += Gelu.SLOPE
        out *= x
        np.tanh(out, out=out)

    @staticmethod
    def in_place(x: Array) -> None:
        """Apply GELU to a few values, without a gradient."""
        tanh = np.empty_like(x)
        Gelu.tanh(x, tanh)
        tanh += np.float32(1)
        tanh *= np.float32(0.5)
        x *= tanh

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Any shape; tanh is kept for the gradient."""
        x = x.contiguous()
        out, tanh = paddle.empty(x.shape, x.dtype), paddle.empty(x.shape, x.dtype)
        xs, os_, ts = (view(t).reshape(-1, x.shape[-1]) for t in (x, out, tanh))

        def work(first: int, last: int) -> None:
            for s in tiles(first, last):
                a, t, o = xs[s], ts[s], os_[s]
                Gelu.tanh(a, t)
                np.add(t, np.float32(1), out=o)
                o *= a
                o *= np.float32(0.5)

        over_rows(work, xs.shape[0], FEW_ROWS)
        ctx.save_for_backward(x, tanh)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """0.5 (1 + t + x (1 - t^2) sqrt(2 / pi) (1 + 3 * 0.044715 x^2)) times the gradient, t the tanh."""
        x, tanh = ctx.saved_tensor()
        out = paddle.empty(x.shape, x.dtype)
        xs, ts, gs, os_ = (view(t).reshape(-1, x.shape[-1]) for t in (x, tanh, grad.contiguous(), out))

        def work(first: int, last: int) -> None:
            for s in tiles(first, last):
                a, t, o = xs[s], ts[s], os_[s]
                inner = a * a
                inner *= 3 * Gelu.CUBIC
                inner += Gelu.SLOPE
                inner *= a
                np.multiply(t, t, out=o)
                np.subtract(np.float32(1), o, out=o)
                o *= inner
                o += t
                o += np.float32(1)
                o *= np.float32(0.5)
                o *= gs[s]

        over_rows(work, xs.shape[0], FEW_ROWS)
        return out


class LayerNorm(PyLayer):  # type: ignore[misc]
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis (Ba et al., 2016)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """``x`` [..., H], ``weight`` and ``bias`` [H]; the normalised rows are kept."""
        H = x.shape[-1]
        x = x.contiguous()
        out, normed = paddle.empty(x.shape, x.dtype), paddle.empty([x.size // H, H], x.dtype)
        xs, os_, ns = view(x).reshape(-1, H), view(out).reshape(-1, H), view(normed)
        w, b = view(weight), view(bias)
        inverse = np.empty((xs.shape[0], 1), dtype=np.float32)

        def work(first: int, last: int) -> None:
            for s in tiles(first, last):
                n = ns[s]
                np.subtract(xs[s], xs[s].mean(-1, keepdims=True), out=n)
                inverse[s, 0] = 1 / np.sqrt(np.einsum("mh,mh->m", n, n) / np.float32(H) + np.float32(eps))
                n *= inverse[s]
                np.multiply(n, w, out=os_[s])
                os_[s] += b

        over_rows(work, xs.shape[0], FEW_ROWS)
        ctx.save_for_backward(normed, weight)
        ctx.inverse = inverse
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For g the gradient times weight and n the normalised row: (g - mean g - n mean(g n)) / std."""
        normed, weight = ctx.saved_tensor()
        H = normed.shape[-1]
        grad_x, product = paddle.empty(grad.shape, grad.dtype), paddle.empty(normed.shape, grad.dtype)
        flat = grad.contiguous().reshape([-1, H])
        ns, gs, os_, ps = view(normed), view(flat), view(grad_x).reshape(-1, H), view(product)
        w = view(weight)

        def work(first: int, last: int) -> None:
            for s in tiles(first, last):
                n, g, o = ns[s], gs[s] * w, os_[s]
                along = np.einsum("mh,mh->m", g, n)[:, None] / np.float32(H)
                np.multiply(n, -along, out=o)
                o += g
                o -= g.mean(-1, keepdims=True)
                o *= ctx.inverse[s]
                np.multiply(n, gs[s], out=ps[s])

        over_rows(work, ns.shape[0])
        return grad_x, _column_sum(product), _column_sum(flat)
