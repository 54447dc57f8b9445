"""What a batch script does, however its ranks end; and that they save when a signal comes twice."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from slurm_stand_in import SLURM, stand_ins
from test_signals import wait_for

from gpt import cli
from gpt.runs.grid import Folder
from gpt.utils import signals as utils_signals
from launchers import slurm
from launchers.slurm import Batch


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return stand_ins(tmp_path, monkeypatch)


@pytest.fixture
def batch(folder: Path, small: list[str]) -> Batch:
    (folder / "cells").mkdir()
    return Batch(cli.compose_job([*small, *SLURM, "grid.retries=1"]), ("a", "b"), folder, "gpt-g", True)


def start(batch: Batch, step: str) -> subprocess.Popen[bytes]:
    (batch.folder / "step.sh").write_text(step)
    text = slurm.script(batch, batch.folder / "jobs" / "0001.sh", batch.folder)
    env = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "7", "SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST": "n1"}
    return subprocess.Popen(["bash", "-c", text], env={**os.environ, **env})


def events(folder: Path) -> list[dict[str, Any]]:
    return Folder(folder).events()


WAITS = "trap 'exit 143' TERM\necho $$ > step\nwhile :; do sleep 0.05; done\n"


def test_a_job_ends_as_its_ranks_do_and_says_so(batch: Batch) -> None:
    assert start(batch, "exit 2").wait(20) == 2
    assert [(e["event"], e["cell"], e["job"], e.get("code")) for e in events(batch.folder)] == [
        ("started", "b", "7_1", None), ("ended", "b", "7_1", 2),
    ]  # fmt: skip


def test_what_failed_is_tried_again_as_often_as_is_said(batch: Batch) -> None:
    assert start(batch, "exit 1").wait(20) == 1
    assert [e["code"] for e in events(batch.folder) if e["event"] == "ended"] == [1, 1]


def test_before_the_time_limit_ranks_are_told_to_save_and_the_job_is_requeued(batch: Batch) -> None:
    job = start(batch, WAITS)
    wait_for((batch.folder / "step").exists)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 143
    assert (batch.folder / "scancel.log").read_text() == "--signal=TERM 9\n"
    assert (batch.folder / "scontrol.log").read_text() == "requeue 9\n"
    assert [e["event"] for e in events(batch.folder)] == ["started", "ended", "requeued"]


@pytest.mark.parametrize(("about", "told"), [("PreemptTime=None", 1), ("PreemptTime=2026-11-24T17:06:40", 2)])
def test_a_job_that_is_cancelled_stays_so_and_one_that_is_preempted_comes_again(
    batch: Batch, about: str, told: int
) -> None:
    (batch.folder / "job").write_text(f"JobId=9 {about} SuspendTime=None\n")
    job = start(batch, WAITS)
    wait_for((batch.folder / "step").exists)
    time.sleep(0.1)
    job.terminate()  # Slurm signals the script and the ranks
    time.sleep(0.1)
    assert job.poll() is None  # it stays to see how they end
    os.kill(int((batch.folder / "step").read_text()), signal.SIGTERM)
    assert job.wait(20) == 143
    lines = (batch.folder / "scontrol.log").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["show", "requeue"][:told]


def test_a_signal_that_comes_twice_at_once_does_not_keep_a_rank_from_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        signals = utils_signals.Signals()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert signals.exit_code == 143
        monkeypatch.setattr(utils_signals, "SAME_SECONDS", 0.0)
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
