"""Measure: what a checkpoint makes of a split, a text, or passages with a last word to find."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from signal import Signals as Signal
from typing import Any

import numpy as np

from gpt.config.task_schemas import EvaluateKind, Split
from gpt.data import eval_dataset, token_files
from gpt.data.eval_dataset import Continuations, EvalRows, Windows
from gpt.data.tokenizer import Encoder
from gpt.parallel.topology import Topology
from gpt.runs import evaluation
from gpt.runs.checkpoint import checkpoint
from gpt.runs.run_dir import Job
from gpt.train import evaluator
from gpt.train.evaluator import EvalTotals
from gpt.train.loggers import build
from gpt.train.trainer import Trainer
from gpt.utils.arrays import Array
from gpt.utils.console import say
from gpt.utils.errors import UserError
from gpt.utils.signals import Signals

Sum = Callable[[EvalRows], EvalTotals]


def run(job: Job, signals: Signals) -> int:
    """Write a record into ``evaluation.json``; returns the exit code. The driver shows it."""
    config, kind = job.config, job.config.evaluate.kind
    topology = Topology.initialize(config)
    source = checkpoint.load_or_fail(Path(str(config.checkpoint)), lambda line: say(f"WARNING: {line}"), topology)
    trainer = Trainer(config, topology, train=False)
    trainer.load(source.model(), None, {})

    def stop() -> bool:  # a signal to any rank is one to all
        return topology.all_reduce_sum(float(signals.received is not None))[0] > 0

    def sums(rows: EvalRows) -> EvalTotals:
        return trainer.evaluator.totals(rows, config.evaluate.batch_size, config.evaluate.max_samples, stop)

    began = time.perf_counter()
    own = job.data.fingerprint == source.state["data_fingerprint"]
    try:
        if kind is EvaluateKind.split:
            figures = _split(job, sums)
        elif kind is EvaluateKind.text:
            figures = _text(job, sums, source.encoder())
        else:
            figures = _cloze(job, sums, source.encoder())
    except evaluator.Interrupted:
        say("stopped; nothing was written")
        return 128 + (signals.received or Signal.SIGTERM)
    figures["seconds"] = time.perf_counter() - began

    if topology.rank == 0:
        key = evaluation.name(config.evaluate, None if own else " and ".join(Path(p.path).name for p in job.data.parts))
        step = source.state["step"]
        evaluation.write(job.run_dir, key, {"checkpoint": str(source.path), "step": step, **figures})
        build.summarise(job, step, key, figures)
    return 0


def _stride(job: Job) -> int:
    return job.config.evaluate.stride or job.config.data.seq_len


def _split(job: Job, sums: Sum) -> dict[str, Any]:
    """Of token files: every set's windows, added up."""
    data = job.config.data
    number = list(Split).index(job.config.evaluate.split)
    eot = job.data.eot_id if data.mask_eot else None
    sets = [
        eval_dataset.of_split(token_files.load(part.path), data.split, number, data.seq_len, _stride(job), eot)
        for part in job.data.parts
    ]
    each = [sums(rows) for rows in sets]
    total = sum(each[1:], each[0])
    per_byte = 1 / job.data.bytes_per_token if job.data.bytes_per_token else None
    record = _of_windows(job, total) | evaluation.language(total.loss, per_byte)
    if len(each) > 1:
        record |= {f"loss of {Path(p.path).name}": s.loss for p, s in zip(job.data.parts, each, strict=True)}
    return record


def _text(job: Job, sums: Sum, encoder: Encoder) -> dict[str, Any]:
    """Of raw text, whose documents are joined by end-of-text as in training."""
    evaluate = job.config.evaluate
    texts = eval_dataset.read(evaluate)
    pieces: list[Array] = []
    for text in texts:
        pieces.append(encoder.encode(eval_dataset.detokenize(text, evaluate.detokenizer)).astype(np.int64))
        if len(texts) > 1 and encoder.eot is not None:
            pieces.append(np.array([encoder.eot]))
    ids = np.concatenate(pieces)
    masked = encoder.eot if len(texts) > 1 and job.config.data.mask_eot else None
    rows = Windows(ids, 0, len(ids), job.config.data.seq_len, _stride(job), masked)
    if not len(rows):
        raise UserError(f"evaluate.path={evaluate.path}: {len(ids)} token(s), nothing to predict")
    total = sums(rows)
    words, size = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
    return {
        **_of_windows(job, total),
        "detokenizer": evaluate.detokenizer.value,
        "documents": len(texts),
        "words": words,
        "bytes": size,
        **evaluation.of_text(total.loss, rows.counted(), words, size),
    }


def _cloze(job: Job, sums: Sum, encoder: Encoder) -> dict[str, Any]:
    """How often each token of the last word is the most probable one, given all before it."""
    evaluate, length = job.config.evaluate, job.config.data.seq_len
    pairs = [eval_dataset.last_word(text) for text in eval_dataset.read(evaluate)]
    contexts, words = ([encoder.encode(pair[part]).astype(np.int64) for pair in pairs] for part in (0, 1))
    longest = max(len(word) for word in words)
    if longest > length:
        raise UserError(f"evaluate.path={evaluate.path}: a last word has {longest} tokens, the model reads {length}")
    rows = Continuations(contexts, words, length)
    total = sums(rows)
    return {
        "passages": int(total.rows),
        "cut_at_the_beginning": rows.cut,
        "tokens": int(total.tokens),
        "correct": int(total.rows_right),
        "accuracy": total.rows_right / total.rows,
        **evaluation.language(total.loss, None),
        "word_perplexity": math.exp(min(total.nll / total.rows, evaluation.LARGEST)),
    }


def _of_windows(job: Job, total: EvalTotals) -> dict[str, Any]:
    return {
        "windows": int(total.rows),
        "seq_len": job.config.data.seq_len,
        "stride": _stride(job),
        "tokens": int(total.tokens),
        "token_accuracy": total.right / max(total.tokens, 1.0),
    }
