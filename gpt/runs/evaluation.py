"""What ``task=evaluate`` is asked, as far as it shows before anything starts, and what it leaves. No Paddle here.

``evaluation.json`` in the run directory has the last record of each kind of evaluation: of each split, of each text
and of each file of passages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt.config.task_schemas import Evaluate, EvaluateKind
from gpt.data import eval_dataset
from gpt.runs import source
from gpt.runs.run_dir import Job
from gpt.utils.files import write_json

FILE = "evaluation.json"
LARGEST = 20.0  # of an exponent: perplexities end at e^20, as those of the predecessor
LN2 = math.log(2)


def problems(job: Job) -> list[str]:
    """What is wrong with the command, given the trained run, each a sentence."""
    evaluate, length = job.config.evaluate, job.config.data.seq_len
    messages = []
    if evaluate.stride is not None and evaluate.stride > length:
        messages.append(
            f"evaluate.stride={evaluate.stride} is longer than the windows of data.seq_len={length} tokens: "
            f"tokens would be left out; from 1 up to {length}"
        )
    if evaluate.kind is EvaluateKind.split:
        return messages
    if evaluate.path:  # else said by gpt.config.rules
        messages += eval_dataset.problems(evaluate)
    if source.vocabulary(job) is None:
        messages.append(
            f"checkpoint={job.config.checkpoint} has no tokenizer, which evaluate.kind={evaluate.kind.value} needs: "
            "train with data.tokenizer=.../tokenizer.json"
        )
    return messages


def name(evaluate: Evaluate, data: str | None) -> str:
    """What ``evaluation.json`` calls an evaluation.

    Args:
        evaluate: the command's section.
        data: what token files were read, if they are not those of the run.
    """
    if evaluate.kind is not EvaluateKind.split:
        return f"{evaluate.kind.value} {evaluate.path}"
    return f"{evaluate.split.value} split" + (f" of {data}" if data else "")


def language(loss: float, tokens_per_byte: float | None) -> dict[str, float]:
    """What follows from a mean loss per token; bits per byte compare across tokenizers, losses do not."""
    record = {"loss": loss, "perplexity": math.exp(min(loss, LARGEST))}
    if tokens_per_byte:
        record["bits_per_byte"] = loss / LN2 * tokens_per_byte
    return record


def of_text(loss: float, predicted: int, words: int, size: int) -> dict[str, float]:
    """The figures of a raw text.

    Per word of the text as it was, a model has predicted ``token_ratio`` tokens; the adjusted perplexity is per such
    word and so compares across tokenizers (Radford et al., 2019; the predecessor's WikiText figures).

    Args:
        loss: nats per predicted token.
        predicted: tokens of the whole text but the first.
        words: pieces between white space of the text as it was.
        size: of the text as it was, in bytes of UTF-8.
    """
    ratio = predicted / max(words - 1, 1)
    return {
        **language(loss, predicted / size),
        "token_ratio": ratio,
        "adjusted_perplexity": math.exp(min(loss * ratio, LARGEST)),
    }


def write(run_dir: Path, key: str, record: dict[str, Any]) -> None:
    """Put a record at the end of ``evaluation.json``, atomically; those of other kinds stay."""
    records = read(run_dir)
    records.pop(key, None)
    write_json(run_dir / FILE, {**records, key: record})


def read(run_dir: Path) -> dict[str, Any]:
    """All records by name; none from a file that is not one of this version."""
    try:
        records: dict[str, Any] = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: record for key, record in records.items() if isinstance(record, dict)}


def rows(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """A record for people."""
    for key, value in record.items():
        if key == "checkpoint":
            continue  # a long path, for those who read the file
        shown = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        yield key.replace("_", " "), shown
