"""Records are whole lines and wait for a full disk; the picture; a run's name."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from conftest import configured

from gpt.config.derived import plain
from gpt.data.corpus import DatasetInfo, DatasetPart
from gpt.runs import run_dir
from gpt.runs.run_dir import Job
from gpt.train.loggers import base as loggers_base
from gpt.train.loss_curve import loss_curve


def job(tmp_path: Path, *overrides: str) -> Job:
    data = DatasetInfo([DatasetPart("x", 1.0)], "f", None, None, None, 100)
    return Job(configured(["data=tokens", "data.path=x", *overrides]), data, tmp_path, ["python", "-m", "gpt.main"])


def test_records_wait_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = loggers_base.Jsonl(tmp_path / "metrics.jsonl")
    sink.write({"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        sink.write({"step": 2})
        sink.write({"step": 3})
    sink.write({"step": 4, "train/loss": float("nan")})
    sink.close("done", 0)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[3]["train/loss"] is None  # JSON has no NaN


def test_a_torn_line_and_later_steps_are_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    run_dir.truncate_metrics(tmp_path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert [r["step"] for r in run_dir.read_metrics(tmp_path)] == [1, 2]


def test_the_picture_is_drawn_from_the_records(tmp_path: Path) -> None:
    rows = [{"step": n, "tokens": 10 * n, "train/loss": 5.0 - n / 10} for n in range(1, 9)]
    rows[-1]["val/loss"] = 4.5
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = loss_curve(tmp_path, configured([]), unigram_entropy=5.5)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size > 10_000


def test_a_run_is_named_after_what_it_computes() -> None:
    base = plain(configured([]))
    name = run_dir.run_name(base, "single")
    assert name.startswith("tiny_single_")
    for same in (
        ["logger=wandb"],
        ["logger.wandb.name=x", "logger.wandb.checkpoints=false"],
        ["tags=[a]"],
        ["trainer.resume=never"],
        ["task=generate"],
        ["cluster.threads=1"],
    ):
        assert run_dir.run_name(plain(configured(same)), "single") == name
    for other in (["seed=2"], ["optimizer.lr=1e-3"], ["trainer.max_steps=9"], ["data.seq_len=64"]):
        assert run_dir.run_name(plain(configured(other)), "single") != name
