"""How probable texts are. B rows, T positions, M = B T, H hidden, V vocabulary."""

from __future__ import annotations

import numpy as np
import paddle
from paddle import Tensor

from gpt import stages
from gpt.data.tokens import Array
from gpt.model import GPT
from gpt.text.decoder import PREFILL_COLUMNS
from gpt.text.request import Scored

LOGITS = 1 << 24  # float32 at once: 64 MiB


def score(model: GPT, texts: list[list[int]]) -> list[Scored]:
    """See ``gpt.text.request.Scorer``; every rank of the model's topology is asked alike and hears the same.

    Args:
        model: in evaluation mode.
        texts: token numbers, none empty, none longer than the model's positions.
    """
    pads_B = max(map(len, texts)) - np.array([len(text) for text in texts])
    rows_BT = np.array([[0] * pad + text for pad, text in zip(pads_B, texts, strict=True)], dtype=np.int64)
    columns = rows_BT.shape[1] - 1  # nothing follows the last
    cache = model.new_cache(columns, pads_B)
    parts = [np.zeros((len(texts), 0, 3))]
    for first in range(0, columns, PREFILL_COLUMNS):
        last = min(first + PREFILL_COLUMNS, columns)
        with paddle.no_grad():
            x_BTH = model.extend(paddle.to_tensor(rows_BT[:, first:last]), cache)
            parts.append(_on_all(model, x_BTH, rows_BT[:, first + 1 : last + 1]))
    found_BT3 = np.concatenate(parts, axis=1)
    kept = [found_T3[pad:].T.tolist() for pad, found_T3 in zip(pads_B, found_BT3, strict=True)]
    return [Scored(logprobs, [int(t) for t in best], tops) for logprobs, best, tops in kept]


def _on_all(model: GPT, x_BTH: Tensor, labels_BT: Array) -> Array:
    """What the last stage knows, on all ranks: log probability, best token, its log probability, in the last axis."""
    shape = [labels_BT.size, 3]
    found: Array = stages.from_last(
        model.topology, shape, "float32", lambda: _of_hidden(model, x_BTH, labels_BT)
    ).numpy()
    return found.reshape(*labels_BT.shape, 3).astype(np.float64)


def _of_hidden(model: GPT, x_BTH: Tensor, labels_BT: Array) -> Tensor:
    x_MH, labels_M = x_BTH.flatten(0, 1), paddle.to_tensor(labels_BT.ravel())
    vocab = model.config.model.vocab
    parts = []
    for first in range(0, x_MH.shape[0], max(1, LOGITS // vocab)):
        some = slice(first, first + max(1, LOGITS // vocab))
        logits_MV = stages.head(model.topology, model.norm(x_MH[some]), model.word.weight, vocab).astype("float32")
        total_M = paddle.logsumexp(logits_MV, axis=-1)
        label_M = paddle.take_along_axis(logits_MV, labels_M[some].unsqueeze(-1), -1).squeeze(-1)
        best_M = logits_MV.argmax(-1).astype("float32")  # exact below 2^24
        parts.append(paddle.stack([label_M - total_M, best_M, logits_MV.max(-1) - total_M], axis=-1))
    return paddle.concat(parts)
