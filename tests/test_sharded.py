"""Whole jobs of several ranks whose checkpoints are shared out: written, lost, read by other tasks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Ran, metrics

from gpt.config.task_schemas import Split
from gpt.data.dataset import TokenDataset
from gpt.runs import run_dir
from gpt.runs.run_dir import Job

pytestmark = pytest.mark.slow

# In every process: the second rank meets this when it flushes its weights of step 8.
HOOK = """
import os
if os.environ.get("PADDLE_TRAINER_ID") == "1" and not os.path.exists({mark!r}):
    flush = os.fsync
    def fsync(descriptor):
        name = os.readlink(f"/proc/self/fd/{{descriptor}}")
        if "step_00000008" in name and "model-00001" in name:
            open({mark!r}, "w").close()
            {act}
        flush(descriptor)
    os.fsync = fsync
"""
ENDS = {
    "killed": ("os.kill(os.getpid(), 9)", "worker 1 was ended by SIGKILL"),
    "disk full": ('raise OSError(28, "No space left on device")', "checkpoint 8 could not be written (rank 1: "),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_rank_that_fails_in_a_save_leaves_the_checkpoint_before(
    gpt: Callable[..., Ran], small: list[str], tmp_path: Path, end: str
) -> None:
    act, said = ENDS[end]
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK.format(mark=str(tmp_path / "mark"), act=act))
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "hook"), str(ROOT)])}
    command = [*small, "parallel=mp2", "hydra.run.dir=run", "trainer.max_steps=8"]
    ran = gpt(*command, env=path)
    assert ran.code == 1, ran.text
    assert said in ran.text
    assert run_dir.checkpoint_steps(tmp_path / "run") == [4]
    ran = gpt(*command, env=path)
    assert ran.code == 0, ran.text
    assert "resuming from step_00000004" in ran.out
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step_00000004", "step_00000008"]
    assert [record["step"] for record in metrics(tmp_path / "run")] == list(range(1, 9))


def test_other_tasks_read_what_eight_ranks_wrote(gpt: Callable[..., Ran], small: list[str], tmp_path: Path) -> None:
    where = "hydra.run.dir=run"
    every = [*small, "trainer.micro_batch_size=2", "trainer.max_steps=4", "trainer.eval_batches=9999"]
    ran = gpt(*every, "parallel=dp2_mp2_pp2", where)
    assert ran.code == 0, ran.text
    assert "--- sample (step 4) ---" in ran.out
    job = Job.read(tmp_path / "run")
    samples = len(TokenDataset(job.config, job.data, Split.val, shuffled=False))  # whole windows, as in training
    ran = gpt("task=evaluate", where, "evaluate.split=val", f"evaluate.max_samples={samples}", "cluster.device=cpu")
    assert ran.code == 0, ran.text
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())["val split"]
    assert found["loss"] == pytest.approx(metrics(tmp_path / "run")[-1]["val/loss"], rel=1e-6)
    ran = gpt("task=generate", where, "generate.max_new_tokens=3", "cluster.device=cpu")
    assert ran.code == 0, ran.text
    assert "sample 1 of 1 (step 4)" in ran.out
