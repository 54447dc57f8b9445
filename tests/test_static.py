"""A static export is the same model: Paddle Inference computes from it what ``GPT.forward`` computes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from conftest import ROOT, configured
from foreign import greedy, loaded, logits, random_parameters

from gpt.config.cluster import Device
from gpt.config.derived import plain, typed
from gpt.config.schema import Config
from gpt.data import tokenizer
from gpt.data.corpus import DatasetInfo
from gpt.parallel.topology import Topology
from gpt.runs.checkpoint import checkpoint, saver
from gpt.runs.checkpoint.reshard import ShardRange, TensorShard
from gpt.runs.convert import paddle_inference

MODEL = ["model=tiny", "model.vocab=300", "model.hidden=60", "model.heads=5", "model.layers=3", "model.positions=40"]
TOKENS = np.random.default_rng(1).integers(0, 300, [3, 21])


def made(folder: Path) -> checkpoint.Checkpoint:
    """A checkpoint with random parameters and a tokenizer."""
    config: Config = configured([*MODEL, "data=tokens", "data.path=x", "data.vocab=300"])
    tokenizer.train(["the cat sat on the mat and the dog saw the cat " * 5], 290, folder / "tokenizer.json")
    pieces = {n: TensorShard(list(a.shape), ShardRange(0, 0, len(a)), a) for n, a in random_parameters(config).items()}
    state = {"step": 7, "config": plain(config), "data": DatasetInfo([], "", 0, None, None, 0).plain()}
    saver.write_alone(folder / "checkpoint", saver.CheckpointShard(7, pieces, {}, state, folder / "tokenizer.json"))
    return checkpoint.Checkpoint(folder / "checkpoint")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``checkpoint`` and ``paddle``."""
    folder = tmp_path_factory.mktemp("exported")
    found = made(folder)
    config = typed(found.state["config"])
    paddle_inference.export(found, config, Topology(config.parallel, Device.cpu), folder / "paddle")
    return folder


def predictor(folder: Path, program: str) -> Any:
    from paddle import inference

    config = inference.Config(str(folder / program), str(folder / "model.pdiparams"))
    config.disable_glog_info()
    config.disable_onednn()
    return inference.create_predictor(config)


def run(a_predictor: Any, *inputs: Any) -> list[Any]:
    return [out.numpy().copy() for out in a_predictor.run([paddle.to_tensor(array) for array in inputs])]


def test_logits_are_those_of_the_model_whatever_the_batch_and_length(exported: Path) -> None:
    model, there = loaded(exported / "checkpoint"), predictor(exported / "paddle", "model.json")
    for tokens in (TOKENS, TOKENS[:1], TOKENS[:2, :1], np.tile(TOKENS, 2)[:, :40]):
        (out,) = run(there, tokens)
        assert out.shape == (*tokens.shape, 300)
        np.testing.assert_allclose(out, logits(model, tokens), atol=1e-5)


def test_steps_with_a_past_give_the_logits_of_the_whole(exported: Path) -> None:
    (whole,) = run(predictor(exported / "paddle", "model.json"), TOKENS)
    step = predictor(exported / "paddle", "step.json")
    past = np.zeros([3, 2, len(TOKENS), 0, 5, 12], np.float32)
    at = 0
    for new in (9, 1, 1, 10):  # a prompt, tokens one by one, and several at once
        out, past = run(step, TOKENS[:, at : at + new], past)
        np.testing.assert_allclose(out, whole[:, at : at + new], atol=1e-5)
        at += new
        assert past.shape == (3, 2, 3, at, 5, 12)


def test_the_folder_says_what_is_needed_to_use_it(exported: Path) -> None:
    info = json.loads((exported / "paddle/model_info.json").read_text())
    assert (info["vocab"], info["positions"], info["eot"], info["step"]) == (300, 40, 0, 7)
    assert (exported / "paddle" / info["tokenizer"]).read_bytes() == (exported / "tokenizer.json").read_bytes()
    files = {"model.json", "step.json", "model.pdiparams", "model_info.json", "tokenizer.json"}
    assert {path.name for path in (exported / "paddle").iterdir()} == files


@pytest.mark.slow
def test_the_program_of_the_page_continues_a_prompt_without_this_package(exported: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs/weights.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(# continue\.py\n.*?)```", page, re.S)
    (tmp_path / "continue.py").write_text(program)
    alone = "import runpy, sys; sys.modules['gpt'] = None; runpy.run_path('continue.py', run_name='__main__')"
    command = [sys.executable, "-W", "ignore", "-c", alone, str(exported / "paddle"), "the cat", "12"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    encoder = tokenizer.open_encoder(exported / "tokenizer.json")
    model = loaded(exported / "checkpoint")
    tokens = greedy(lambda row: logits(model, row), encoder.encode("the cat").tolist(), 12)
    assert done.stdout == encoder.decode(tokens[: tokens.index(0)] if 0 in tokens else tokens) + "\n"
