"""A checkpoint is whole or not there; a damaged one is passed over; nothing older is lost for one that failed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from gpt import checkpoint, files
from gpt.runs import checkpoint_steps

MODEL = {"word.weight": np.arange(12, dtype=np.float32).reshape(3, 4)}
SLOTS = {"word.weight.moment1_0": np.full((3, 4), 0.5, np.float32)}


def state(step: int) -> dict[str, Any]:
    return {"step": step, "config": {}, "data_fingerprint": "f"}


def save(run_dir: Path, step: int) -> None:
    checkpoint.write(checkpoint.folder_of(run_dir, step), MODEL, SLOTS, state(step), None)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    save(tmp_path, 20)
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found is not None
    assert found.path == tmp_path / "checkpoints" / "step_00000020"
    assert found.state == state(20)
    assert (found.model()["word.weight"] == MODEL["word.weight"]).all()
    assert (found.optimizer()["word.weight.moment1_0"] == 0.5).all()


def test_weights_are_safetensors_that_others_can_read(tmp_path: Path) -> None:
    from safetensors import safe_open

    save(tmp_path, 1)
    with safe_open(checkpoint.folder_of(tmp_path, 1) / "model.safetensors", framework="numpy") as file:
        assert list(file.keys()) == ["word.weight"]
        assert file.metadata()["step"] == "1"
        assert json.loads(file.metadata()["config"]) == {}


HARM = {
    "cut short": lambda p: os.truncate(p / "model.safetensors", 20),
    "a flipped bit": lambda p: (p / "optimizer.safetensors").write_bytes(
        (p / "optimizer.safetensors").read_bytes()[:-1] + b"\x01"
    ),
    "a missing file": lambda p: (p / "state.json").unlink(),
    "no manifest": lambda p: (p / "manifest.json").unlink(),
    "half a manifest": lambda p: (p / "manifest.json").write_text('{"format": 1, "fil'),
    "another format": lambda p: (p / "manifest.json").write_text('{"format": 99, "files": {}}'),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, harm: str) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    HARM[harm](checkpoint.folder_of(tmp_path, 20))
    warnings: list[str] = []
    found = checkpoint.newest(tmp_path, warnings.append)
    assert found is not None
    assert found.state["step"] == 10
    assert len(warnings) == 1
    assert "step_00000020 is damaged and passed over" in warnings[0]


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    save(tmp_path, 10)
    HARM["cut short"](checkpoint.folder_of(tmp_path, 10))
    save(tmp_path, 10)
    assert checkpoint.damage(checkpoint.folder_of(tmp_path, 10)) is None


def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    saver = checkpoint.Saver(tmp_path, keep=1, say=said.append)
    saver.submit(10, MODEL, SLOTS, state(10), None)
    assert saver.wait() is None

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", full)
        saver.submit(20, MODEL, SLOTS, state(20), None)
        assert isinstance(saver.wait(), OSError)
    assert "checkpoint 20 could not be written" in said[0]
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000010"]
    saver.submit(30, MODEL, SLOTS, state(30), None)
    assert saver.wait() is None
    assert checkpoint_steps(tmp_path) == [30]


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    saver = checkpoint.Saver(tmp_path, keep=2, say=pytest.fail)
    for step in (5, 10, 15, 20):
        saver.submit(step, MODEL, SLOTS, state(step), None)
    saver.wait()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_00000015", "step_00000020"]


def test_saving_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *a: (time.sleep(0.5), slow(*a)))
    saver = checkpoint.Saver(tmp_path, keep=2, say=pytest.fail)
    began = time.perf_counter()
    saver.submit(5, MODEL, SLOTS, state(5), None)
    assert time.perf_counter() - began < 0.3
    assert checkpoint_steps(tmp_path) == []
    saver.wait()
    assert checkpoint_steps(tmp_path) == [5]


WRITER = """
import sys
from pathlib import Path
import numpy as np
from gpt import checkpoint
run, step = Path(sys.argv[1]), 0
while True:
    step += 1
    arrays = {"a": np.full(200_000, step, np.float32)}
    checkpoint.write(checkpoint.folder_of(run, step), arrays, arrays, {"step": step, "config": {}}, None)
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_of_a_save_leaves_whole_checkpoints_only(tmp_path: Path) -> None:
    for attempt in range(12):
        run = tmp_path / str(attempt)
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(run)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout
            writer.stdout.readline()
            time.sleep(0.002 * attempt)
            writer.send_signal(signal.SIGKILL)
            rest = writer.stdout.read().split()
        announced = int(rest[-1]) if rest else 1
        found = checkpoint.newest(run, pytest.fail)  # nothing with its final name is damaged
        assert found is not None
        assert found.state["step"] in (announced, announced + 1)
        assert (found.model()["a"] == found.state["step"]).all()
        files.remove_leftovers(run / "checkpoints")
        assert len(os.listdir(run / "checkpoints")) == len(checkpoint_steps(run))


def test_an_atomic_text_survives_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    files.write_json(path, {"a": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full"):
            files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["result.json"]
