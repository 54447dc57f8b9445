"""Score texts. B rows, T positions, M = B T, H hidden, V vocabulary."""

from __future__ import annotations

import numpy as np
import paddle
from paddle import Tensor

from gpt.inference.decoder import PREFILL_COLUMNS
from gpt.inference.types import TokenLogprobs
from gpt.model.gpt import GPT
from gpt.model.token_scores import head_scores
from gpt.parallel import pipeline_comm
from gpt.utils.arrays import Array


def score(model: GPT, texts: list[list[int]]) -> list[TokenLogprobs]:
    """Return log probabilities of texts, token numbers; a collective call with the same result on all ranks.

    The model is in evaluation mode, no text empty or longer than its positions and one more.
    """
    pads_B = max(map(len, texts)) - np.array([len(text) for text in texts])
    rows_BT = np.array([[0] * pad + text for pad, text in zip(pads_B, texts, strict=True)], dtype=np.int64)
    columns = rows_BT.shape[1] - 1  # nothing follows the last
    cache = model.new_cache(columns, pads_B)
    parts = [np.zeros((len(texts), 0, 3))]
    for first in range(0, columns, PREFILL_COLUMNS):
        last = min(first + PREFILL_COLUMNS, columns)
        with paddle.no_grad():
            x_BTH = model.forward_cached(paddle.to_tensor(rows_BT[:, first:last]), cache)
            parts.append(_broadcast_scores(model, x_BTH, rows_BT[:, first + 1 : last + 1]))
    rows = [scores_T3[pad:].T.tolist() for pad, scores_T3 in zip(pads_B, np.concatenate(parts, axis=1), strict=True)]
    return [TokenLogprobs(logprobs, [int(t) for t in best], tops) for logprobs, best, tops in rows]


def _broadcast_scores(model: GPT, x_BTH: Tensor, labels_BT: Array) -> Array:
    """Return, on all ranks, log probability, best token and its log probability in the last axis."""
    shape = [labels_BT.size, 3]
    scores_M3: Array = pipeline_comm.broadcast_from_last_stage(
        model.topology, shape, "float32", lambda: _head_scores(model, x_BTH, labels_BT)
    ).numpy()
    return scores_M3.reshape(*labels_BT.shape, 3).astype(np.float64)


def _head_scores(model: GPT, x_BTH: Tensor, labels_BT: Array) -> Tensor:
    x_MH, labels_M = model.norm(x_BTH).flatten(0, 1), paddle.to_tensor(labels_BT.ravel())
    nll_M, best_M, best_nll_M = head_scores(model.topology, x_MH, model.word.weight, labels_M, model.config.model.vocab)
    return paddle.stack([-nll_M, best_M.astype("float32"), -best_nll_M], axis=-1)  # float32 is exact below 2^24
