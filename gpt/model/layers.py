"""The operations of the model: on a CPU the kernels of this project, elsewhere Paddle's own.

B batch, T positions, N heads, D head size, E = 3 D, S positions so far, M rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor, nn
from paddle.distributed.fleet.utils import recompute
from paddle.nn import functional as F

from gpt.model import cpu_attention, cpu_decode, cpu_kernels
from gpt.parallel.topology import Topology
from gpt.utils.arrays import Array


def _on_cpu(x: Tensor) -> bool:
    """Return whether to use the kernels of this project: not on distributed tensors, nor in static programs."""
    return bool(x.place.is_cpu_place() and not x.is_dist()) if paddle.in_dynamic_mode() else False


def _apply(kernel: Any, *arguments: Any) -> Tensor:
    """Run a kernel; it keeps what its gradient needs only if there will be one."""
    out: Tensor = (
        kernel.apply(*arguments)
        if paddle.is_grad_enabled()
        else kernel.forward(cpu_kernels.NoGradContext(), *arguments)
    )
    return out


def sum_of_squares(tensors: list[Tensor]) -> float:
    """Return the sum of squares over all elements of all tensors as one number on the host."""
    if all(_on_cpu(tensor) and tensor.dtype == paddle.float32 for tensor in tensors):
        return sum(cpu_kernels.sum_of_squares(tensor) for tensor in tensors)
    return float(paddle.stack([tensor.astype("float32").square().sum() for tensor in tensors]).sum().item())


def causal_attention(qkv_BTNE: Tensor, dropout: float) -> Tensor:
    """Return softmax(q k' / sqrt(D)) v over the positions up to one's own, with dropout on the probabilities: BTND."""
    if _on_cpu(qkv_BTNE):
        return _apply(cpu_attention.CausalAttention, qkv_BTNE, dropout)
    q, k, v = paddle.split(qkv_BTNE, 3, axis=-1)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def attention_after(qkv_BTNE: Tensor, keys_BNSD: Tensor, values_BNSD: Tensor, start: int, pads_B: Array) -> Tensor:
    """Return the attention BTND of T new positions to all up to their own, for decoding.

    Args:
        qkv_BTNE: of the new positions, which are columns ``start`` and following.
        keys_BNSD: of the columns before; the new ones are written into it.
        values_BNSD: likewise.
        start: columns before.
        pads_B: left padding of each row, which is masked.
    """
    if _on_cpu(qkv_BTNE) and qkv_BTNE.dtype == paddle.float32:
        return cpu_decode.attention(qkv_BTNE, keys_BNSD, values_BNSD, start, pads_B)
    T = qkv_BTNE.shape[1]
    stop = start + T
    q, k, v = (x.transpose([0, 2, 1, 3]) for x in paddle.split(qkv_BTNE, 3, axis=-1))
    keys_BNSD[:, :, start:stop] = k
    values_BNSD[:, :, start:stop] = v
    columns_S = np.arange(stop)
    seen_TS = columns_S[None] <= np.arange(start, stop)[:, None]
    seen = paddle.to_tensor(seen_TS[None, None] & (columns_S >= pads_B[:, None])[:, None, None])
    scores = paddle.matmul(q * q.shape[-1] ** -0.5, keys_BNSD[:, :, :stop], transpose_y=True).astype("float32")
    share = F.softmax(paddle.where(seen, scores, paddle.full([1], -1e30)), axis=-1).astype(q.dtype)
    return paddle.matmul(share, values_BNSD[:, :, :stop]).transpose([0, 2, 1, 3])


def head_loss(x_MH: Tensor, table_VH: Tensor, labels_M: Tensor, weight_M: Tensor, vocab: int, chunk: int) -> Tensor:
    """Return the sum of ``weight_M`` times the cross entropies of the tied head, in float32.

    Args:
        x_MH: final hidden states.
        table_VH: the word embedding; rows from ``vocab`` on are padding.
        labels_M: int64.
        weight_M: float32.
        vocab: real tokens.
        chunk: rows whose logits exist at once; 0 for all.
    """
    rows = x_MH.shape[0]
    chunk = min(chunk or rows, rows)
    if _on_cpu(x_MH):
        return cpu_attention.HeadLoss.apply(x_MH, table_VH, labels_M, weight_M, vocab, chunk, paddle.is_grad_enabled())

    def part(x: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        each = F.cross_entropy(logits(x, table_VH, vocab).astype("float32"), labels, reduction="none")
        return (each.flatten() * weight).sum()

    if chunk == rows:
        return part(x_MH, labels_M, weight_M)
    cuts = [slice(i, i + chunk) for i in range(0, rows, chunk)]
    parts = [recompute(part, x_MH[s], labels_M[s], weight_M[s]) for s in cuts]
    return paddle.stack(parts).sum()


def logits(x: Tensor, table_VH: Tensor, vocab: int) -> Tensor:
    """Apply the tied head to [..., H]; return [..., V], with -1e9 (float16: -6e4) in the columns of padding rows."""
    if x.ndim == 2 and _on_cpu(x) and not paddle.is_grad_enabled():
        out = cpu_kernels.product(x, table_VH, transposed=True)
    else:
        out = paddle.matmul(x, table_VH, transpose_y=True)
    if table_VH.shape[0] == vocab:
        return out
    low = -6e4 if out.dtype == paddle.float16 else -1e9
    padding = paddle.full([table_VH.shape[0] - vocab], low, dtype=out.dtype)
    return out + paddle.concat([paddle.zeros([vocab], dtype=out.dtype), padding])


def gelu(x: Tensor) -> Tensor:
    """Apply GELU in its tanh approximation."""
    return _apply(cpu_kernels.Gelu, x) if _on_cpu(x) else F.gelu(x, approximate=True)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Apply dropout with scaling by 1 / (1 - p) in training; the identity otherwise."""
    if not training or p == 0:
        return x
    return _apply(cpu_kernels.Dropout, x, p) if _on_cpu(x) else F.dropout(x, p)


class Linear(nn.Linear):  # type: ignore[misc]
    """Paddle's layer: ``weight`` [in, out] and ``bias``, to be initialised by the model."""

    def __init__(self, size_in: int, size_out: int) -> None:
        zeros = nn.initializer.Constant(0.0)
        super().__init__(size_in, size_out, weight_attr=zeros, bias_attr=zeros)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        return _apply(cpu_kernels.Linear, x, self.weight, self.bias) if _on_cpu(x) else super().forward(x)


class LayerNorm(nn.LayerNorm):  # type: ignore[misc]
    """Paddle's layer over the last axis."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__(size, epsilon=epsilon)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., H]."""
        if _on_cpu(x):
            return _apply(cpu_kernels.LayerNorm, x, self.weight, self.bias, self.epsilon)
        # Paddle's tracer follows super() one class up only, and ``FinalNorm`` is a class below.
        return F.layer_norm(x, self._normalized_shape, self.weight, self.bias, self.epsilon)


def head(topology: Topology, x_BH: Tensor, table_VH: Tensor, vocab: int) -> Tensor:
    """Return the logits BV of the tied head over the real vocabulary, the same on all mp ranks."""
    logits_BV = logits(x_BH, table_VH, table_VH.shape[0])
    if topology.parallel.mp_degree > 1:
        parts: list[Tensor] = []
        dist.all_gather(parts, logits_BV, topology.mp_group)
        logits_BV = paddle.concat(parts, axis=-1)
    return logits_BV if logits_BV.shape[-1] == vocab else logits_BV[:, :vocab].contiguous()


def column_linear(topology: Topology, size_in: int, size_out: int) -> nn.Layer:
    """Return an uninitialised linear layer whose output columns are split over the tensor-parallel ranks."""
    if topology.tp_degree == 1:
        return Linear(size_in, size_out)
    from gpt.parallel import tensor_parallel

    return tensor_parallel.column_linear(size_in, size_out, by_position=topology.parallel.sequence_parallel)


def row_linear(topology: Topology, size_in: int, size_out: int) -> nn.Layer:
    """Return an uninitialised linear layer whose input rows are split over the tensor-parallel ranks."""
    if topology.tp_degree == 1:
        return Linear(size_in, size_out)
    from gpt.parallel import tensor_parallel

    return tensor_parallel.row_linear(size_in, size_out, by_position=topology.parallel.sequence_parallel)


def embedding(topology: Topology, rows: int, size: int) -> nn.Layer:
    """Return an uninitialised embedding whose rows are split over the tensor-parallel ranks."""
    if topology.tp_degree == 1:
        return nn.Embedding(rows, size, weight_attr=nn.initializer.Constant(0.0))
    from gpt.parallel import tensor_parallel

    return tensor_parallel.embedding(rows, size)


def parallel_head_loss(
    topology: Topology, x_MH: Tensor, table_VH: Tensor, labels_M: Tensor, weight_M: Tensor, vocab: int, chunk: int
) -> Tensor:
    """Like ``head_loss``, over a table whose rows are split over the tensor-parallel ranks."""
    if topology.tp_degree == 1:
        return head_loss(x_MH, table_VH, labels_M, weight_M, vocab, chunk)
    from gpt.parallel import tensor_parallel

    return tensor_parallel.head_loss(x_MH, table_VH, labels_M, weight_M, vocab, chunk, topology.mp_group)
