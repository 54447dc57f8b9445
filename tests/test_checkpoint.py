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

from gpt.runs.checkpoint import checkpoint, shard_files
from gpt.runs.checkpoint import saver as checkpoint_saver
from gpt.runs.checkpoint.reshard import ShardRange, TensorShard, TensorShards
from gpt.runs.checkpoint.saver import CheckpointShard
from gpt.runs.run_dir import checkpoint_steps
from gpt.utils import files

WORD = np.arange(12, dtype=np.float32).reshape(3, 4)


def whole(array: np.ndarray) -> TensorShard:
    return TensorShard(list(array.shape), ShardRange(0, 0, len(array)), array)


MODEL = {"word.weight": whole(WORD)}
SLOTS = {"word.weight.moment1_0": whole(np.full((3, 4), 0.5, np.float32))}


def state(step: int) -> dict[str, Any]:
    return {"step": step, "config": {}, "data_fingerprint": "f"}


def part(step: int, model: TensorShards = MODEL, slots: TensorShards = SLOTS) -> CheckpointShard:
    return CheckpointShard(step, model, slots, state(step))


def save(run_dir: Path, step: int) -> None:
    saver = checkpoint_saver.Saver(run_dir, keep=99, say=pytest.fail)
    saver.submit(part(step))
    assert saver.wait() is None


def halves(step: int) -> list[CheckpointShard]:
    """Of two ranks that share out the columns of the table, and the second has nothing of the slots."""
    left, right = (
        TensorShard([3, 4], ShardRange(1, a, a + 2), np.ascontiguousarray(WORD[:, a : a + 2])) for a in (0, 2)
    )
    return [part(step, {"word.weight": left}), part(step, {"word.weight": right}, {})]


def savers(run_dir: Path, said: list[str], keep: int = 9) -> list[checkpoint_saver.Saver]:
    return [checkpoint_saver.Saver(run_dir, keep, said.append, rank, 2) for rank in (0, 1)]


def save_together(ranks: list[checkpoint_saver.Saver], step: int) -> Exception | None:
    for saver, mine in zip(ranks, halves(step), strict=True):
        saver.submit(mine)
    ranks[1].wait()
    return ranks[0].wait()


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    save(tmp_path, 20)
    found = checkpoint.latest_valid(tmp_path, pytest.fail)
    assert found is not None
    assert found.path == tmp_path / "checkpoints" / "step_00000020"
    assert found.state == state(20)
    assert (found.model()["word.weight"] == WORD).all()
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
    "half a manifest": lambda p: (p / "manifest.json").write_text('{"format": 2, "fil'),
    "another format": lambda p: (p / "manifest.json").write_text('{"format": 99, "files": {}}'),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, harm: str) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    HARM[harm](checkpoint.folder_of(tmp_path, 20))
    warnings: list[str] = []
    found = checkpoint.latest_valid(tmp_path, warnings.append)
    assert found is not None
    assert found.state["step"] == 10
    assert len(warnings) == 1
    assert "step_00000020 is damaged and passed over" in warnings[0]


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    save(tmp_path, 10)
    HARM["cut short"](checkpoint.folder_of(tmp_path, 10))
    save(tmp_path, 10)
    assert checkpoint.verify(checkpoint.folder_of(tmp_path, 10)) is None


def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    saver = checkpoint_saver.Saver(tmp_path, keep=1, say=said.append)
    saver.submit(part(10))
    assert saver.wait() is None

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shard_files, "write", full)
        saver.submit(part(20))
        assert isinstance(saver.wait(), OSError)
    assert "checkpoint 20 could not be written" in said[0]
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000010"]
    saver.submit(part(30))
    assert saver.wait() is None
    assert checkpoint_steps(tmp_path) == [30]


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    saver = checkpoint_saver.Saver(tmp_path, keep=2, say=pytest.fail)
    for step in (5, 10, 15, 20):
        saver.submit(part(step))
    saver.wait()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_00000015", "step_00000020"]


def test_saving_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = shard_files.write
    monkeypatch.setattr(shard_files, "write", lambda *a: (time.sleep(0.3), slow(*a))[1])
    saver = checkpoint_saver.Saver(tmp_path, keep=2, say=pytest.fail)
    began = time.perf_counter()
    saver.submit(part(5))
    assert time.perf_counter() - began < 0.3
    assert checkpoint_steps(tmp_path) == []
    saver.wait()
    assert checkpoint_steps(tmp_path) == [5]


WRITER = """
import sys
from pathlib import Path
import numpy as np
from gpt.runs.checkpoint import saver as saving
from gpt.runs.checkpoint.reshard import ShardRange, TensorShard
run, step = Path(sys.argv[1]), 0
saver = saving.Saver(run, 999, print)
while True:
    step += 1
    arrays = {"a": TensorShard([200_000], ShardRange(0, 0, 200_000), np.full(200_000, step, np.float32))}
    saver.submit(saving.CheckpointShard(step, arrays, arrays, {"step": step, "config": {}}))
    saver.wait()
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
        found = checkpoint.latest_valid(run, pytest.fail)  # nothing with its final name is damaged
        assert found is not None
        assert found.state["step"] in (announced, announced + 1)
        assert (found.model()["a"] == found.state["step"]).all()
        files.remove_leftovers(run / "checkpoints")
        assert len(os.listdir(run / "checkpoints")) == len(checkpoint_steps(run))


def test_slices_of_ranks_are_one_array_for_any_reader(tmp_path: Path) -> None:
    assert save_together(savers(tmp_path, []), 10) is None
    folder = checkpoint.folder_of(tmp_path, 10)
    assert {path.name for path in folder.iterdir()} == {
        "model-00000-of-00002.safetensors",
        "model-00001-of-00002.safetensors",
        "optimizer-00000-of-00002.safetensors",
        "index.json",
        "state.json",
        "manifest.json",
    }
    found = checkpoint.latest_valid(tmp_path, pytest.fail)
    assert found is not None
    stored = found.model()
    assert (stored["word.weight"] == WORD).all()
    assert (stored.read("word.weight", ShardRange(0, 1, 3)) == WORD[1:3]).all()
    assert (stored.read("word.weight", ShardRange(1, 1, 3)) == WORD[:, 1:3]).all()
    assert stored.read("word.weight", ShardRange(0, 3, 3)).shape == (0, 4)


def test_a_rank_that_cannot_write_costs_the_checkpoint_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    ranks = savers(tmp_path, said, keep=1)
    assert save_together(ranks, 10) is None
    real = shard_files.write

    def full(path: Path, *rest: Any) -> shard_files.FileDigest:
        if "00001" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(shard_files, "write", full)
        assert "rank 1: [Errno 28] No space left on device" in str(save_together(ranks, 20))
    assert any("checkpoint 20 could not be written" in line for line in said)
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000010"]
    assert save_together(ranks, 30) is None
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000030"]


def test_a_rank_that_ended_while_it_wrote_or_before_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_saver, "ABSENT_SECONDS", 0.3)
    ranks = savers(tmp_path, [])
    ranks[0].submit(halves(10)[0])
    assert "rank 1 has not begun to write" in str(ranks[0].wait())
    folder = tmp_path / "checkpoints" / ".tmp-step_00000020"
    folder.mkdir()
    (folder / "rank-00001.json").touch()  # without its lock
    ranks[0].submit(halves(20)[0])
    assert "rank 1 has ended" in str(ranks[0].wait())
    assert os.listdir(tmp_path / "checkpoints") == []


def test_slices_that_leave_a_gap_are_not_published(tmp_path: Path) -> None:
    saver = checkpoint_saver.Saver(tmp_path, 1, lambda line: None)
    saver.submit(halves(10)[0])
    assert "word.weight of shape [3, 4] ends at 2" in str(saver.wait())
    assert os.listdir(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("harm", ["gone", "changed"])
def test_one_ranks_file_is_enough_for_damage(tmp_path: Path, harm: str) -> None:
    ranks = savers(tmp_path, [])
    for step in (10, 20):
        assert save_together(ranks, step) is None
    file = checkpoint.folder_of(tmp_path, 20) / "model-00001-of-00002.safetensors"
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    warnings: list[str] = []
    found = checkpoint.latest_valid(tmp_path, warnings.append)
    assert found is not None
    assert found.state["step"] == 10
    assert file.name in warnings[0]


def test_an_atomic_text_survives_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    files.write_json(path, {"a": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full"):
            files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["result.json"]
