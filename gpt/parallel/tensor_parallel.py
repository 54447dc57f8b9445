"""Fleet's tensor-parallel layers, and the head over a split vocabulary.

With sequence parallel (Korthikanti et al., 2022) the activations between the split linears are split by position:
TBH, as Fleet wants them, each rank with its T / mp positions.

M rows, H hidden, V vocabulary rows of this rank.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle import Tensor, nn
from paddle.distributed import fleet
from paddle.distributed.fleet.layers.mpu import mp_ops
from paddle.distributed.fleet.utils import recompute
from paddle.distributed.fleet.utils import sequence_parallel_utils as sequence


def _zeros() -> Any:
    return nn.initializer.Constant(0.0)  # the model gives the values


def column_linear(size_in: int, size_out: int, *, by_position: bool) -> nn.Layer:
    """Return a linear whose output columns are split; ``by_position``: from all ranks' positions."""
    kind = sequence.ColumnSequenceParallelLinear if by_position else fleet.meta_parallel.ColumnParallelLinear
    return kind(size_in, size_out, weight_attr=_zeros(), has_bias=True, gather_output=False)


def row_linear(size_in: int, size_out: int, *, by_position: bool) -> nn.Layer:
    """Return a linear whose input columns are split and whose outputs are summed; ``by_position``: reduce-scattered."""
    kind = sequence.RowSequenceParallelLinear if by_position else fleet.meta_parallel.RowParallelLinear
    return kind(size_in, size_out, weight_attr=_zeros(), has_bias=True, input_is_parallel=True)


def own_positions(x_TBH: Tensor) -> Tensor:
    """Return this rank's positions of a replicated tensor; the backward pass gathers."""
    return sequence.ScatterOp.apply(x_TBH)


def all_positions(x_TBH: Tensor) -> Tensor:
    """Gather the positions of all ranks: the inverse of ``own_positions``."""
    return sequence.GatherOp.apply(x_TBH)


def embedding(rows: int, size: int) -> nn.Layer:
    """Return an embedding whose rows are split and whose results are summed."""
    return fleet.meta_parallel.VocabParallelEmbedding(rows, size, weight_attr=_zeros())


def head_loss(
    x_MH: Tensor, table_VH: Tensor, labels_M: Tensor, weight_M: Tensor, vocab: int, chunk: int, group: Any
) -> Tensor:
    """Like ``gpt.model.layers.head_loss``, with the rows of the table split over ``group``; equal on all its ranks."""
    entropy = fleet.meta_parallel.ParallelCrossEntropy(mp_group=group)

    def part(x: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        logits = _logits(x, table_VH, vocab, group).astype("float32")
        return (entropy(logits, labels.unsqueeze(-1)).flatten() * weight).sum()

    rows = x_MH.shape[0]
    x_MH = mp_ops._c_identity(x_MH, group=group)
    if not chunk or chunk >= rows:
        return part(x_MH, labels_M, weight_M)
    cuts = [slice(i, i + chunk) for i in range(0, rows, chunk)]
    return paddle.stack([recompute(part, x_MH[s], labels_M[s], weight_M[s]) for s in cuts]).sum()


def _logits(x_MH: Tensor, table_VH: Tensor, vocab: int, group: Any) -> Tensor:
    """Return the logits of this rank's rows; those of padding rows are so low that they do not count."""
    out_MV = paddle.matmul(x_MH, table_VH, transpose_y=True)
    rows = table_VH.shape[0]
    real = min(max(vocab - group.rank * rows, 0), rows)
    if real == rows:
        return out_MV
    low = -6e4 if out_MV.dtype == paddle.float16 else -1e9
    padding = paddle.full([rows - real], low, dtype=out_MV.dtype)
    return out_MV + paddle.concat([paddle.zeros([real], dtype=out_MV.dtype), padding])
