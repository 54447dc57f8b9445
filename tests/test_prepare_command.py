"""Preparation as a user sees it: the command, killed and started again, a full disk, and training on what it made."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SMALL
from test_prepare import content, jsonl, texts
from test_run import Run

from gpt.data import vocabularies
from gpt.data.tokenizer import open_encoder

pytestmark = pytest.mark.slow

OUTPUT = "prepare.output=made/x"
SMALL_VOCAB = "prepare.vocab=300"


def test_the_command_prepares_and_its_next_command_trains(gpt: Run, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", texts(400))
    ran = gpt("task=prepare", source, OUTPUT, SMALL_VOCAB, "prepare.val_share=0.1", "prepare.dedup=true")
    assert ran.code == 0, ran.text
    assert "python -m gpt.main data=tokens data.path=made/x" in ran.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "made"]
    assert not [p.name for p in (tmp_path / "made").iterdir() if not p.name.startswith(("x_", "x_val_"))]
    trained = gpt(*SMALL, "data=tokens", "data.path=made/x", "trainer.max_steps=2", "hydra.run.dir=run")
    assert trained.code == 0, trained.text
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "val/bits_per_byte" in result  # the manifest says how many bytes a token has
    assert (tmp_path / "run" / "samples.jsonl").exists()  # and the tokenizer came along


def test_chinese_takes_a_vocabulary_of_its_own_which_is_twice_as_dense_as_gpt2s(gpt: Run, tmp_path: Path) -> None:
    import jieba

    # The Chinese that comes with a package of the test environment: words with how often they occur, drawn so.
    lines = [line.split() for line in Path(jieba.__file__).with_name("dict.txt").read_text("utf-8").splitlines()]
    drawn = random.Random(0).choices([line[0] for line in lines], [int(line[1]) for line in lines], k=80_000)
    rows = ["".join(drawn[i : i + 40]) + "。" for i in range(0, len(drawn), 40)]
    source = jsonl(tmp_path / "zh.jsonl", rows)
    ran = gpt("task=prepare", source, OUTPUT, "prepare.vocab=4000")
    assert ran.code == 0, ran.text
    made = json.loads((tmp_path / "made" / "x_manifest.json").read_text())
    gpt2 = open_encoder(vocabularies.find("gpt2", tmp_path))
    assert made["bytes_per_token"] > 2 * made["bytes"] / sum(len(gpt2.encode(row)) for row in rows)
    trained = gpt(
        *SMALL, "data=tokens", "data.path=made/x", "model.vocab=4000", "trainer.max_steps=2", "hydra.run.dir=run",
        "generate.prompt='北京'",
    )  # fmt: skip
    assert trained.code == 0, trained.text
    (sample,) = (tmp_path / "run" / "samples.jsonl").read_text("utf-8").splitlines()
    assert re.search("[\u4e00-\u9fff]", json.loads(sample)["text"])


def started(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "gpt.main", "task=prepare", *arguments]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_a_killed_preparation_goes_on_and_ends_with_the_same_bytes(gpt: Run, tmp_path: Path) -> None:
    rows = texts(3000) * 60  # five chunks
    source = jsonl(tmp_path / "a.jsonl", rows)
    assert gpt("task=prepare", source, "prepare.output=whole/x", SMALL_VOCAB).code == 0
    arguments = (source, OUTPUT, SMALL_VOCAB, "prepare.workers=1")
    process = started(tmp_path, *arguments)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "made").glob("x_work_*/[0-9]*.npz")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "made").glob("x_i*"))
    ran = gpt("task=prepare", *arguments)
    assert ran.code == 0, ran.text
    assert "going on" in ran.text
    assert content(tmp_path / "made" / "x") == content(tmp_path / "whole" / "x")
    assert not list((tmp_path / "made").glob("x_work*"))


def test_a_full_disk_leaves_the_files_of_before(gpt: Run, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", texts(200))
    assert gpt("task=prepare", source, OUTPUT, SMALL_VOCAB).code == 0
    before = content(tmp_path / "made" / "x")
    other = jsonl(tmp_path / "b.jsonl", texts(30_000, seed=2))
    command = [sys.executable, "-m", "gpt.main", "task=prepare", other, OUTPUT, SMALL_VOCAB]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000)),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr
    assert content(tmp_path / "made" / "x") == before


@pytest.mark.parametrize("bad", [["prepare.input=nowhere"], ["prepare.input=a.jsonl", "prepare.json_key=body"]])
def test_bad_input_is_said_and_leaves_nothing(gpt: Run, tmp_path: Path, bad: list[str]) -> None:
    jsonl(tmp_path / "a.jsonl", texts(5))
    ran = gpt("task=prepare", OUTPUT, SMALL_VOCAB, *bad)
    assert ran.code == 2
    assert "1 problem, nothing was started" in ran.err
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
