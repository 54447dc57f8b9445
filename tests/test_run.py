"""Whole jobs, as a user starts, interrupts, kills and repeats them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Ran, metrics, wandb_records, wandb_summary

from gpt.runs import run_dir as runs
from gpt.runs import wandb_run
from gpt.runs.checkpoint import checkpoint
from scripts import make_dashboard
from scripts.kill_test import workers_of

pytestmark = pytest.mark.slow
Run = Callable[..., Ran]


def final_weights(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    found = checkpoint.latest_valid(run_dir, pytest.fail)
    assert found is not None
    assert found.state["step"] == step
    return found.model()


def assert_same_end(one: Path, other: Path, step: int = 12) -> None:
    """Losses of all steps and the last weights are the same, bit for bit."""
    keys = ("step", "tokens", "train/loss", "lr", "grad_norm", "val/loss")
    rows = [[{k: r.get(k) for k in keys} for r in metrics(run)] for run in (one, other)]
    assert rows[0] == rows[1]
    assert [r["step"] for r in rows[0]] == list(range(1, step + 1))
    ours, theirs = final_weights(one, step), final_weights(other, step)
    for name, value in ours.items():
        assert (value == theirs[name]).all(), name


@contextmanager
def started(tmp_path: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command in the background, killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt.main", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for_step(run_dir: Path, step: int, saves: int = 0, seconds: float = 60) -> None:
    """And for so many checkpoints: they are written in the background, late on a busy machine."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        path = run_dir / "metrics.jsonl"
        saved = len(list(run_dir.glob("checkpoints/step_*")))
        if saved >= saves and path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.01)
    pytest.fail(f"step {step} did not come")


def wait_until_gone(run_dir: Path, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while workers_of(run_dir):
        assert time.monotonic() < deadline, f"workers of {run_dir} still run"
        time.sleep(0.05)


# --- what a run leaves ---


def test_a_run_leaves_what_the_contract_names(whole: Path) -> None:
    assert {p.name for p in whole.iterdir()} >= {
        "job.json",
        "metrics.jsonl",
        "result.json",
        "checkpoints",
        "logs",
        "samples.jsonl",
        "loss.png",
    }
    assert (whole / "logs" / "worker.0.log").stat().st_size > 0
    assert (whole / "loss.png").read_bytes()[:4] == b"\x89PNG"
    records = metrics(whole)
    assert [r["step"] for r in records] == list(range(1, 13))
    assert all({"tokens", "train/loss", "lr", "grad_norm", "tokens_per_second"} <= set(r) for r in records)
    assert all(r["tokens"] == r["step"] * 8 * 32 for r in records)
    assert [r["step"] for r in records if "val/loss" in r] == [6, 12]
    assert all("mfu" not in r for r in records)  # no peak is known for this CPU
    result = json.loads((whole / "result.json").read_text())
    assert result["status"] == "done"
    assert result["step"] == 12
    assert result["train/loss"] == records[-1]["train/loss"]
    assert result["val/loss"] == records[-1]["val/loss"]
    assert runs.checkpoint_steps(whole) == [4, 8, 12]
    job = json.loads((whole / "job.json").read_text())
    assert "${" not in json.dumps(job["config"])
    assert job["config"]["model"]["hidden"] == 32
    assert job["versions"]["paddlepaddle"]
    assert job["data"]["fingerprint"]
    (start,) = (json.loads(line) for line in (whole / "starts.jsonl").read_text().splitlines())
    assert start["command"] == job["command"]
    assert start["git"] == job["git"]


def test_the_losses_do_not_depend_on_being_recorded_elsewhere(
    gpt: Run, small: list[str], whole: Path, tmp_path: Path
) -> None:
    ran = gpt(*small, "hydra.run.dir=run", "logger=wandb", "logger.tensorboard=true", "tags=[mine]")
    assert ran.code == 0, ran.text
    assert_same_end(whole, tmp_path / "run")
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))

    offline = next((tmp_path / "run" / "wandb").glob("offline-run-*"))
    records = wandb_records(offline)
    rows = [r["history"]["item"] for r in records if r.get("type") == "history"]
    assert [row["_step"] for row in rows] == list(range(1, 13))
    assert [row["train/loss"] for row in rows] == pytest.approx([r["train/loss"] for r in metrics(whole)])
    assert [row["tokens"] for row in rows] == [256 * n for n in range(1, 13)]
    kept = next(r for r in records if r.get("type") == "run")
    assert "mine" in json.dumps(kept)
    assert (tmp_path / "run" / "wandb_id").read_text() in offline.name
    drawn = {key for charts in make_dashboard.SECTIONS.values() for chart in charts for key in chart.keys}
    seldom = {"mfu", "loss_scale"}  # not of this CPU, not in float32
    assert (drawn - seldom) | {make_dashboard.X} <= {key for row in rows for key in row}
    assert rows[-1][f"{make_dashboard.SAMPLES}.nrows"] == 1
    checkpoints = [r["artifact"] for r in records if r.get("type") == "artifact" and "step_" in str(r)]
    references = [entry["ref"] for each in checkpoints for entry in each["manifest"]["contents"]]
    assert f"file://{tmp_path}/run/checkpoints/step_00000012/model.safetensors" in references
    ended = wandb_summary(offline)
    assert (ended["state"], ended["summary"]["status"]) == ("finished", "done")
    best = min(r["val/loss"] for r in metrics(whole) if "val/loss" in r)
    assert ended["summary"]["val/loss"]["min"] == pytest.approx(best)
    assert "wandb sync run/wandb" in ran.out
    assert "wandb leet run/wandb" in ran.out


def test_other_tasks_read_the_run(gpt: Run, whole: Path) -> None:
    where = f"hydra.run.dir={whole}"
    ran = gpt(
        "task=generate", where, "generate.prompt='The '", "generate.num_return_sequences=2", "generate.max_new_tokens=9"
    )
    assert ran.code == 0, ran.text
    assert "sample 2 of 2" in ran.out
    again = gpt(
        "task=generate", where, "generate.prompt='The '", "generate.num_return_sequences=2", "generate.max_new_tokens=9"
    )
    assert again.out == ran.out  # the seed decides
    rows = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert rows[-1]["prompt"] == "The "

    ran = gpt("task=evaluate", where, "evaluate.split=val")
    assert ran.code == 0, ran.text
    found = json.loads((whole / "evaluation.json").read_text())["val split"]
    # The whole split, where training looks at two batches: near, and measured on more.
    assert found["loss"] == pytest.approx(json.loads((whole / "result.json").read_text())["val/loss"], rel=0.05)
    assert found["windows"] > 0


# --- repeat, go on, start afresh ---


def test_the_same_command_again_says_that_it_is_done(gpt: Run, small: list[str], whole: Path) -> None:
    before = (whole / "result.json").read_bytes()
    ran = gpt(*small, f"hydra.run.dir={whole}")
    assert ran.code == 0
    assert "this run is done: step 12" in ran.out
    assert (whole / "result.json").read_bytes() == before


def test_a_longer_horizon_goes_on_as_if_it_had_been_meant(
    gpt: Run, small: list[str], whole: Path, tmp_path: Path
) -> None:
    assert gpt(*small, "hydra.run.dir=run", "trainer.max_steps=5").code == 0
    ran = gpt(*small, "hydra.run.dir=run")
    assert ran.code == 0, ran.text
    assert "changed since this run began: trainer.max_steps 5 -> 12" in ran.out
    assert "resuming from step_00000005" in ran.out
    ours, theirs = final_weights(tmp_path / "run", 12), final_weights(whole, 12)
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_start_afresh_keeps_the_earlier_run(gpt: Run, small: list[str], tmp_path: Path) -> None:
    quick = [*small, "hydra.run.dir=run", "trainer.max_steps=2"]
    assert gpt(*quick).code == 0
    (tmp_path / "run" / "mine.txt").write_text("a note")
    ran = gpt(*quick, "trainer.resume=never")
    assert ran.code == 0, ran.text
    assert "starting afresh; the earlier run is now in" in ran.out
    assert (tmp_path / "run.old-1" / "mine.txt").read_text() == "a note"
    assert [r["step"] for r in metrics(tmp_path / "run")] == [1, 2]


def test_a_run_of_another_model_or_text_is_not_overwritten(
    gpt: Run, small: list[str], whole: Path, tmp_path: Path
) -> None:
    ran = gpt(*small, f"hydra.run.dir={whole}", "model.layers=3")
    assert ran.code == 2
    assert "model.layers is 2 there and 3 here" in ran.err
    (tmp_path / "other.txt").write_text("other words\n" * 30_000)
    ran = gpt(*small, f"hydra.run.dir={whole}", f"data.path={tmp_path}/other.txt")
    assert ran.code == 2
    assert "its tokenizer is another one" in ran.err


def test_must_resume_or_fail(gpt: Run, small: list[str], tmp_path: Path) -> None:
    ran = gpt(*small, "hydra.run.dir=run", "trainer.resume=must")
    assert ran.code == 2
    assert "there is no checkpoint in" in ran.err
    assert not (tmp_path / "run").exists()


# --- interrupted ---


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on(
    gpt: Run, small: list[str], whole: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    slow = [*small, "hydra.run.dir=run", "trainer.save_every=0"]
    with started(tmp_path, *slow) as process:
        wait_for_step(tmp_path / "run", 3)
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.fail("the job was faster than the signal")
    assert process.returncode == code, out
    assert f"stopped by {number.name} after step" in out
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "stopped"
    assert workers_of(tmp_path / "run") == []
    ran = gpt(*slow)
    assert ran.code == 0, ran.text
    assert "resuming from step_" in ran.out
    assert_same_end(whole, tmp_path / "run")


@pytest.mark.parametrize("victim", ["worker", "driver", "both"])
def test_a_kill_loses_at_most_the_steps_since_the_last_save(
    gpt: Run, small: list[str], whole: Path, tmp_path: Path, victim: str
) -> None:
    run_dir = tmp_path / "run"
    small = [*small, *(["logger=wandb"] if victim == "both" else [])]
    with started(tmp_path, *small, "hydra.run.dir=run") as process:
        wait_for_step(run_dir, 6, saves=1)
        if victim in ("driver", "both"):
            process.kill()
        if victim in ("worker", "both"):
            for worker in workers_of(run_dir):
                os.kill(worker, signal.SIGKILL)
        out, _ = process.communicate(timeout=60)
    if victim == "worker":
        assert process.returncode == 1
        assert "was ended by SIGKILL" in out
    wait_until_gone(run_dir)  # no orphan, whoever was killed
    ran = gpt(*small, "hydra.run.dir=run")
    assert ran.code == 0, ran.text
    assert "resuming from step_" in ran.out
    assert_same_end(whole, run_dir)
    starts = [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]
    assert [start["from_step"] > 0 for start in starts] == [False, True]
    if victim == "both":  # at W&B it is one run with one curve
        (offline,) = wandb_run.segments(run_dir)
        rows = [r["history"]["item"] for r in wandb_records(offline) if r.get("type") == "history"]
        assert [row["_step"] for row in rows] == list(range(1, 13))
        assert [row["train/loss"] for row in rows] == pytest.approx([r["train/loss"] for r in metrics(whole)])


def test_a_damaged_checkpoint_costs_only_its_own_steps(gpt: Run, small: list[str], whole: Path, tmp_path: Path) -> None:
    assert gpt(*small, "hydra.run.dir=run", "trainer.max_steps=9").code == 0
    os.truncate(tmp_path / "run" / "checkpoints" / "step_00000009" / "model.safetensors", 100)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "tok')  # as a crash tears it
    ran = gpt(*small, "hydra.run.dir=run")
    assert ran.code == 0, ran.text
    assert "step_00000009 is damaged and passed over" in ran.out
    assert "resuming from step_00000008" in ran.out
    ours, theirs = final_weights(tmp_path / "run", 12), final_weights(whole, 12)
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert [r["step"] for r in metrics(tmp_path / "run")] == list(range(1, 13))


def test_a_loss_that_is_no_number_ends_with_3_and_the_last_good_checkpoint(
    gpt: Run, small: list[str], tmp_path: Path
) -> None:
    wild = [*small, "hydra.run.dir=run", "optimizer.lr=1e30", "optimizer.clip_norm=0", "schedule.warmup_steps=0"]
    ran = gpt(*wild, "trainer.save_every=1")
    assert ran.code == 3, ran.text
    assert "at step" in ran.out
    assert "the weights were not touched" in ran.out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "guard"
    found = checkpoint.latest_valid(tmp_path / "run", pytest.fail)
    assert found is not None
    assert found.state["step"] == result["step"]


def test_two_commands_on_one_run_do_not_mix(gpt: Run, small: list[str], tmp_path: Path) -> None:
    long = [*small, "hydra.run.dir=run", "trainer.max_steps=100000", "trainer.eval_every=0", "trainer.save_every=0"]
    with started(tmp_path, *long) as process:
        wait_for_step(tmp_path / "run", 2)
        ran = gpt(*long, timeout=60)
        assert ran.code == 2
        assert "is in use by another process" in ran.err
        assert process.poll() is None
        process.terminate()
        process.wait(60)


def test_a_full_disk_is_said_and_loses_nothing(gpt: Run, small: list[str], tmp_path: Path) -> None:
    """A real one: a file system of a few MB in memory, filled to the last byte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(disk)], check=False, capture_output=True
    )
    if mounted.returncode:
        # Without the right to mount, a limit on file size gives the same kind of error at the same place.
        limited = _limited(small, tmp_path)
        assert limited.returncode == 1
        assert "Traceback" not in limited.stdout + limited.stderr
        return
    try:
        assert gpt(*small, f"hydra.run.dir={disk}/run", "trainer.max_steps=4").code == 0
        longer = [*small, f"hydra.run.dir={disk}/run", "trainer.max_steps=8"]
        for room in (0, 200_000):  # not even for job.json; for records but not for a checkpoint
            _fill(disk / "filler", room)
            ran = gpt(*longer)
            assert ran.code == 1, ran.text
            assert "No space left on device" in ran.text
            assert "Traceback" not in ran.text
        assert runs.checkpoint_steps(disk / "run") == [4]
        assert checkpoint.verify(checkpoint.folder_of(disk / "run", 4)) is None
        (disk / "filler").unlink()
        ran = gpt(*longer)
        assert ran.code == 0, ran.text
        assert "resuming from step_00000004" in ran.out
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _fill(path: Path, room: int) -> None:
    """Fill the disk up to ``room`` bytes."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while os.write(descriptor, b"\0" * 4096):
            pass
    os.ftruncate(descriptor, max(0, os.fstat(descriptor).st_size - room))
    os.close(descriptor)


def _limited(small: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    command = " ".join([sys.executable, "-m", "gpt.main", *small, "hydra.run.dir=run"])
    return subprocess.run(
        ["bash", "-c", f"trap '' XFSZ; ulimit -f 64; {command}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
