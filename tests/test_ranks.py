"""Jobs of several ranks as a user starts and stops them: one command, one set of files, the numbers of one rank."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import harness
import pytest
from conftest import SMALL, configured, metrics
from test_run import Run, started, wait_for_step

from gpt.config.derived import plain
from gpt.runs import run_dir as runs
from gpt.runs.checkpoint import checkpoint

pytestmark = pytest.mark.slow

SAME = ("model.dropout=0", "model.attention_dropout=0", "trainer.micro_batch_size=2")


def train(gpt: Run, run_dir: Path, *overrides: str) -> list[dict[str, Any]]:
    """Run a job to its end; its records."""
    ran = gpt(*overrides, f"hydra.run.dir={run_dir}", timeout=200)
    assert ran.code == 0, ran.text
    return metrics(run_dir)


@pytest.mark.parametrize("preset", ["pp2", "sharding2_stage3"])
def test_one_command_trains_measures_and_samples_on_two_ranks(
    gpt: Run, small: list[str], tmp_path: Path, preset: str
) -> None:
    one = train(gpt, tmp_path / "one", *small, *SAME)
    two = train(gpt, tmp_path / "two", *small, *SAME, f"parallel={preset}")
    for key in ("train/loss", "val/loss"):
        assert [r.get(key) for r in two] == [pytest.approx(r[key], rel=1e-5) if key in r else None for r in one]
    assert [r["step"] for r in two] == list(range(1, 13))
    result, expected = runs.read_result(tmp_path / "two"), runs.read_result(tmp_path / "one")
    assert result is not None
    assert expected is not None
    assert result["parameters"] == expected["parameters"]
    assert len((tmp_path / "two" / "samples.jsonl").read_text().splitlines()) == 1
    assert sorted(p.name for p in (tmp_path / "two" / "logs").glob("*.log")) == ["worker.0.log", "worker.1.log"]

    # The other tasks read what several ranks wrote: generation on one rank, evaluation on as many as before.
    for task in ("generate", "evaluate"):
        ran = gpt(f"task={task}", f"hydra.run.dir={tmp_path / 'two'}", timeout=100)
        assert ran.code == 0, ran.text
    said = re.search(r"loss +([0-9.]+)", ran.text)
    assert said
    assert float(said[1]) == pytest.approx(result["val/loss"], rel=0.05)


def test_a_signal_to_a_job_of_two_ranks_saves_and_the_other_topology_goes_on(
    gpt: Run, small: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = [*small, *SAME, f"hydra.run.dir={run_dir}", "trainer.max_steps=400", "trainer.save_every=0"]
    with started(tmp_path, *arguments, "parallel=dp2") as process:
        wait_for_step(run_dir, 3)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 143
    found = checkpoint.latest_valid(run_dir, pytest.fail)
    assert found is not None
    step = found.state["step"]
    assert step == len(metrics(run_dir))
    records = train(gpt, run_dir, *arguments[:-2], f"trainer.max_steps={step + 2}")
    assert [r["step"] for r in records] == list(range(1, step + 3))


def test_a_rank_that_is_late_is_waited_for(text: Path) -> None:
    config = plain(configured([*SMALL, "data=text", f"data.path={text}", "parallel=dp2"]))
    assert harness.run("ranks:late", 2, config, 33.0) == [2.0, 2.0]  # Gloo alone gives up after 30 seconds


def test_a_rank_that_has_ended_is_noticed_at_once(text: Path) -> None:
    config = plain(configured([*SMALL, "data=text", f"data.path={text}", "parallel=dp2"]))
    assert harness.run("ranks:quits", 2, config, timeout=100)[0] == "the connection to a peer rank was lost"
