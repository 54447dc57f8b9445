"""Preparing as a user does: killed, on a full disk, with bad input, and then trained on."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, Ran
from test_prepare import jsonl

from gpt.data import tokenizer_files
from gpt.data.tokenizer import open_encoder

pytestmark = pytest.mark.slow
Run = Callable[..., Ran]
PREPARE = ["task=prepare", "prepare.input=in", "prepare.output=out/x", "prepare.workers=2", "prepare.vocab=384"]
# The vocabulary and the chunks made small: what takes minutes on a corpus takes seconds here.
START = f"""
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, with all its children
from gpt.data.preprocess import pipeline
pipeline.CHUNK_BYTES = {1 << 16}
check = pipeline._check_bad_share
def unhurried(*arguments, **options):
    time.sleep(float(os.environ.get("SECONDS_PER_CHUNK", 0)))
    check(*arguments, **options)
pipeline._check_bad_share = unhurried
from gpt.main import main
sys.argv[0] = "gpt"
main()
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three megabytes of JSON lines, and what is made of them undisturbed."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "in").mkdir()
    rows = [f"{i} " + "what is told three times is true " * (1 + i % 40) for i in range(4_000)]
    (folder / "in" / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))
    code, told = ended(command(folder))
    assert code == 0, told
    return folder


@pytest.fixture
def corpus(prepared: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)


def command(folder: Path, seconds_per_chunk: float = 0.0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", START, *PREPARE],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SECONDS_PER_CHUNK": str(seconds_per_chunk)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output."""
    told = process.communicate(timeout=120)[0]
    return process.returncode, told


def made(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((folder / "out").iterdir()) if p.is_file()}


@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_killed_preparation_goes_on_with_what_is_done(corpus: Path, how: signal.Signals, code: int) -> None:
    expected = made(corpus)
    for path in (corpus / "out").iterdir():
        path.unlink()

    process = command(corpus, seconds_per_chunk=0.2)  # so that it is surely not over when the signal comes
    deadline = time.monotonic() + 60
    while len(list(corpus.glob("out/x_work_*/*.npz"))) < 12 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(how)
    assert ended(process)[0] == code
    (work,) = corpus.glob("out/x_work_*")
    done = len(list(work.glob("*.npz")))
    assert done >= 12
    assert not (corpus / "out" / "x_manifest.json").exists()
    status, told = ended(command(corpus))
    assert status == 0, told
    assert "going on: " in told
    assert made(corpus) == expected
    assert sorted(p.name for p in (corpus / "out").iterdir()) == sorted(expected)


def test_a_full_disk_fails_with_1_and_leaves_what_was_there(corpus: Path) -> None:
    before = made(corpus)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # noqa: E731
    done = subprocess.run(
        [sys.executable, "-m", "gpt.main", *PREPARE, "prepare.min_length=20"],
        cwd=corpus,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        preexec_fn=limit,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "FAILED: [Errno 27] File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert made(corpus) == before


def test_bad_input_ends_with_2_if_it_is_found_at_once_and_with_1_later(gpt: Run, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 2000)
    arguments = ["task=prepare", "prepare.input=a.jsonl", "prepare.output=out/x", "prepare.vocab=300"]
    ran = gpt(*arguments)
    assert ran.code == 2, ran.text
    assert "none of the first 1,000 records is usable: no key 'text', only body (1,000); first at a.jsonl:1" in ran.err
    assert os.listdir(tmp_path) == ["a.jsonl"]
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n' * 50 + "broken\n" * 10)
    ran = gpt(*arguments)
    assert ran.code == 1, ran.text
    assert "FAILED: 10 of 60 records are unusable, more than prepare.max_bad=0.001; nothing was made" in ran.err
    assert "a.jsonl:51: not JSON" in ran.err
    assert "Traceback" not in ran.text
    assert not list((tmp_path / "out").glob("x_[imt]*"))


def test_what_is_prepared_trains_and_writes_text_in_the_next_command(gpt: Run, tmp_path: Path, text: Path) -> None:
    prepared = gpt("task=prepare", f"prepare.input={text}", "prepare.output=p", *SMALL)
    assert prepared.code == 0, prepared.text
    assert "data=tokens data.path=p" in prepared.out
    trained = gpt(*SMALL, "data=tokens", "data.path=p", "hydra.run.dir=run", "cluster.device=cpu")
    assert trained.code == 0, trained.text
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["val/bits_per_byte"] > 0
    told = json.loads((tmp_path / "p_manifest.json").read_text())
    job = json.loads((tmp_path / "run" / "job.json").read_text())
    assert job["data"]["bytes_per_token"] == told["bytes_per_token"]
    assert job["data"]["eot_id"] == 0
    again = gpt("task=generate", "hydra.run.dir=run", "cluster.device=cpu", "generate.prompt='the 天'", *SMALL)
    assert again.code == 0, again.text
    assert "the 天" in again.out


def test_chinese_takes_a_vocabulary_of_its_own_which_is_twice_as_dense_as_gpt2s(gpt: Run, tmp_path: Path) -> None:
    import jieba

    # The Chinese that comes with a package of the test environment: words with how often they occur, drawn so.
    lines = [line.split() for line in Path(jieba.__file__).with_name("dict.txt").read_text("utf-8").splitlines()]
    drawn = random.Random(0).choices([line[0] for line in lines], [int(line[1]) for line in lines], k=80_000)
    rows = ["".join(drawn[i : i + 40]) + "。" for i in range(0, len(drawn), 40)]
    source = jsonl(tmp_path / "zh.jsonl", rows)
    ran = gpt("task=prepare", source, "prepare.output=made/x", "prepare.vocab=4000")
    assert ran.code == 0, ran.text
    made = json.loads((tmp_path / "made" / "x_manifest.json").read_text())
    gpt2 = open_encoder(tokenizer_files.find("gpt2", tmp_path))
    assert made["bytes_per_token"] > 2 * made["bytes"] / sum(len(gpt2.encode(row)) for row in rows)
    trained = gpt(
        *SMALL, "data=tokens", "data.path=made/x", "model.vocab=4000", "trainer.max_steps=2", "hydra.run.dir=run",
        "prompt=北京",
    )  # fmt: skip
    assert trained.code == 0, trained.text
    (sample,) = (tmp_path / "run" / "samples.jsonl").read_text("utf-8").splitlines()
    assert re.search("[\u4e00-\u9fff]", json.loads(sample)["text"])
