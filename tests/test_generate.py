"""``task=generate`` as a user types it, over any topology."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import harness
import pytest
from conftest import ROOT, Ran, configured

from gpt.config.derived import plain
from gpt.runs import source

pytestmark = pytest.mark.slow
Run = Callable[..., Ran]
PROMPTS = ["The ", "def join(self, path):", "a"]


@pytest.fixture(scope="module")
def alone(whole: Path) -> list[list[str]]:
    """What one rank writes."""
    return texts(whole, 1)


def texts(run_dir: Path, ranks: int, *overrides: str) -> list[list[str]]:
    """Of random texts, two for each prompt, by the first of some ranks."""
    ask = ["task=generate", f"checkpoint={run_dir}", "generate.num_return_sequences=2", "generate.max_new_tokens=40"]
    config = configured([*ask, *overrides])
    job = plain(source.job(config, run_dir).config)
    found = harness.run("ranks:write", ranks, job, PROMPTS, 1 if "dp" in str(overrides) else 3)
    assert all(texts == found[0] for texts in found)
    return found[0]


@pytest.mark.parametrize(("ranks", "layout"), [(2, "dp2"), (4, "mp2_pp2")], ids=["dp2", "mp2_pp2"])
def test_every_topology_writes_the_same_texts(whole: Path, alone: list[list[str]], ranks: int, layout: str) -> None:
    assert texts(whole, ranks, f"parallel={layout}") == alone
    assert len({text for both in alone for text in both}) == 6


def test_prompts_from_standard_input_end_as_json_lines(tmp_path: Path, whole: Path) -> None:
    command = ["task=generate", f"checkpoint={whole}", "generate.prompts=-", "generate.output=out.jsonl"]
    done = subprocess.run(
        [sys.executable, "-m", "gpt.main", *command, "generate.max_new_tokens=5", "generate.batch_size=2"],
        input="The \nOne two\nthree\n",
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["number"], row["prompt"]) for row in rows] == [(0, "The "), (1, "One two"), (2, "three")]
    assert all(row["tokens"] <= 5 and row["finish"] in ("stop", "length") and row["logprob"] < 0 for row in rows)


def test_a_session_in_a_terminal_shows_the_text_as_it_comes_and_ends_with_ctrl_d(tmp_path: Path, whole: Path) -> None:
    ours, theirs = pty.openpty()
    command = ["task=generate", f"checkpoint={whole}", "generate.interactive=true", "generate.max_new_tokens=30"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt.main", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        heard = _until(ours, b"> ", b"")
        os.write(ours, b"The first\n")
        heard = _until(ours, b"> ", heard)
        os.write(ours, b"\n")  # nothing: it asks again
        heard = _until(ours, b"> ", heard)
        os.write(ours, b"x" * 60 + b"\n")
        heard = _until(ours, b"> ", heard)
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(ours)
    text = heard.decode().replace("\r\n", "\n")
    row = json.loads((whole / "samples.jsonl").read_text().splitlines()[-1])
    assert row["prompt"] == "The first"
    assert f"The first{row['text']}\n" in text
    assert re.search(r"that is \d+ tokens; from 1 to 32 can be continued", text)


def _until(descriptor: int, mark: bytes, heard: bytes, seconds: float = 90) -> bytes:
    """All that was heard, up to one more ``mark`` at its end."""
    begin, deadline = len(heard), time.monotonic() + seconds
    while not heard[begin:].endswith(mark):
        assert time.monotonic() < deadline, heard
        heard += os.read(descriptor, 1024)
    return heard


BAD = {
    "nothing there": (["checkpoint=nowhere"], ["checkpoint=nowhere: no such folder"]),
    "too many workers": (["parallel.mp_degree=4"], ["model.heads=2 is not divisible by parallel.mp_degree=4"]),
    "long prompt": (["prompt=" + "z" * 60], ["a prompt is longer than the model's 32 positions: prompt 1 has"]),
    "sampling": (
        ["generate.top_p=2", "generate.temperature=-1", "generate.num_beams=0"],
        ["generate.top_p=2.0", "generate.temperature=-1.0", "generate.num_beams=0"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message_and_nothing_is_started(gpt: Run, tmp_path: Path, whole: Path, name: str) -> None:
    overrides, said = BAD[name]
    logs = sorted(path.name for path in (whole / "logs").iterdir())
    ran = gpt("task=generate", *([] if name == "nothing there" else [f"checkpoint={whole}"]), *overrides)
    assert ran.code == 2, ran.text
    assert all(each in ran.err for each in said), ran.err
    assert "Traceback" not in ran.text
    assert (list(tmp_path.iterdir()), sorted(path.name for path in (whole / "logs").iterdir())) == ([], logs)


def test_a_checkpoint_that_lies_alone_is_enough_and_a_damaged_or_speechless_one_is_not(
    gpt: Run, tmp_path: Path, whole: Path
) -> None:
    alone = tmp_path / "mine"
    shutil.copytree(whole / "checkpoints" / "step_00000012", alone)
    ran = gpt("task=generate", "checkpoint=mine", "generate.max_new_tokens=3", "prompt='The '")
    assert ran.code == 0, ran.text
    assert (tmp_path / "outputs" / "from_mine" / "samples.jsonl").is_file()
    with open(alone / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    ran = gpt("task=generate", "checkpoint=mine")
    assert (ran.code, "is damaged: model.safetensors has changed" in ran.text) == (2, True), ran.text
    (alone / "tokenizer.json").unlink()
    ran = gpt("task=generate", "checkpoint=mine")
    assert (ran.code, "the checkpoint has no tokenizer" in ran.err) == (2, True), ran.text
    assert "Traceback" not in ran.text
