"""Per-token log-probabilities from the (vocabulary-parallel) output head, for evaluation, so without gradients.

M rows, H hidden, V vocabulary rows of this rank.
"""

from __future__ import annotations

from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.distributed import ReduceOp

from gpt.parallel.topology import Topology

LOGITS = 1 << 24  # float32 at once: 64 MiB
LOW = -1e30  # logit of what a rank does not have
NOWHERE = float(1 << 40)  # behind every token number


Scores = tuple[Tensor, Tensor, Tensor]


def label_scores(
    topology: Topology, x_BTH: Tensor, table_VH: Tensor, labels_BT: Tensor, vocab: int
) -> tuple[Tensor, Tensor]:
    """Return the cross entropy of each label BT, and whether it is the most probable token; see ``head_scores``."""
    nll_M, best_M, _ = head_scores(topology, x_BTH.flatten(0, 1), table_VH, labels_BT.flatten(), vocab)
    return nll_M.reshape(labels_BT.shape), best_M.reshape(labels_BT.shape) == labels_BT


def head_scores(topology: Topology, x_MH: Tensor, table_VH: Tensor, labels_M: Tensor, vocab: int) -> Scores:
    """Return each label's cross entropy, the most probable token (the first of equals), and that one's cross entropy.

    Args:
        topology: of this rank; over an mp group of several, each has its share of the table.
        x_MH: final hidden states.
        table_VH: rows from ``vocab`` on, counted over the ranks, are padding and take no part.
        labels_M: int64.
        vocab: real tokens.
    """
    group = topology.mp_group if topology.parallel.mp_degree > 1 else None
    chunk = max(1, LOGITS // table_VH.shape[0])
    cuts = [slice(i, i + chunk) for i in range(0, x_MH.shape[0], chunk)]
    with paddle.no_grad():
        parts = [_part(x_MH[s], table_VH, labels_M[s], vocab, topology.mp_rank, group) for s in cuts]
    nll_M, best_M, best_nll_M = (paddle.concat(list(scores)) for scores in zip(*parts, strict=True))
    return nll_M, best_M, best_nll_M


def _part(x_MH: Tensor, table_VH: Tensor, labels_M: Tensor, vocab: int, mp_rank: int, group: Any) -> Scores:
    rows = table_VH.shape[0]
    first = mp_rank * rows
    real = min(max(vocab - first, 0), rows)
    out_MV = paddle.matmul(x_MH, table_VH[: max(real, 1)], transpose_y=True)
    with paddle.amp.auto_cast(enable=False):  # what follows is in float32
        logits_MV = out_MV.astype("float32") if real else paddle.full(out_MV.shape, LOW, dtype="float32")
        return _of_logits(logits_MV, labels_M, first, real, group)


def _of_logits(logits_MV: Tensor, labels_M: Tensor, first: int, real: int, group: Any) -> Scores:
    """Score labels by the logits of this rank's ``real`` tokens from number ``first`` on."""
    at_M = logits_MV.argmax(-1)
    own_top_M = _at(logits_MV, at_M)
    top_M = _over(group, own_top_M, ReduceOp.MAX)

    here_M = labels_M - first
    mine_M = paddle.logical_and(here_M >= 0, here_M < real).astype("float32")
    label_M = _at(logits_MV, here_M.clip(0, max(real - 1, 0)))
    sums_M = paddle.exp(logits_MV - top_M.unsqueeze(-1)).sum(-1)
    sums_M, label_M = _over(group, paddle.stack([sums_M, (label_M - top_M) * mine_M]), ReduceOp.SUM).unbind()

    number_M = (at_M + first).astype("float64")
    number_M = paddle.where(own_top_M == top_M, number_M, paddle.full_like(number_M, NOWHERE))
    best_M = -_over(group, -number_M, ReduceOp.MAX)
    best_nll_M = paddle.log(sums_M)  # its logit is what was taken off
    return best_nll_M - label_M, best_M.astype("int64"), best_nll_M


def _at(logits_MV: Tensor, at_M: Tensor) -> Tensor:
    return paddle.take_along_axis(logits_MV, at_M.unsqueeze(-1), -1).squeeze(-1)


def _over(group: Any, value: Tensor, op: Any) -> Tensor:
    """Reduce a copy of ``value`` over the mp ranks."""
    if group is not None:
        value = value.clone()
        dist.all_reduce(value, op, group=group)
    return value
