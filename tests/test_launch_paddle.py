"""What Paddle's own errors look like when a rank is lost or a port is taken, so that the right rank is blamed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, metrics
from test_signals import alive, wait_for

from gpt.utils.outcome import Outcome
from launchers import local, rank_env

pytestmark = pytest.mark.slow

WORKER = """
import os, subprocess, sys, time
rank = int(os.environ["PADDLE_TRAINER_ID"])
if sys.argv[1] == "slow" and rank == 1:  # its connections are gone a second before it is
    subprocess.run([sys.executable, __file__, "killed"])
    time.sleep(1)
    print("the cause", flush=True)
    sys.exit(7)
import paddle, paddle.distributed as dist
paddle.disable_signal_handler()
dist.init_parallel_env()
x = paddle.ones([4])
dist.all_reduce(x)
if sys.argv[1] == "killed" and rank == 1:
    os.kill(os.getpid(), 9)
dist.all_reduce(x)
print("met", int(x[0]), flush=True)
"""


def launched(folder: Path, how: str, ranks: int, taken: str = "") -> tuple[Outcome, list[str]]:
    (folder / "worker.py").write_text(WORKER)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PADDLE_")}
    shown: list[str] = []
    starts: list[int] = []

    def choose() -> list[rank_env.RankEnv]:
        starts.append(1)
        free = rank_env.here(ranks, gpu=False)
        return [replace(place, master=taken) for place in free] if taken and len(starts) == 1 else free

    outcome = local.run_workers(
        [str(folder / "worker.py"), how], choose, folder / "logs", env, show=shown.append, poll=lambda: None
    )
    return outcome, shown


def test_a_killed_rank_is_blamed_and_not_who_waited_for_it(tmp_path: Path) -> None:
    outcome, _ = launched(tmp_path, "killed", 2)
    assert (outcome.code, outcome.rank) == (-signal.SIGKILL, 1)


def test_who_reports_a_lost_connection_first_is_not_blamed(tmp_path: Path) -> None:
    outcome, shown = launched(tmp_path, "slow", 2)
    assert (outcome.code, outcome.rank) == (7, 1), shown
    assert outcome.last_lines[-1] == "the cause"


def test_a_taken_port_costs_one_more_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        outcome, shown = launched(tmp_path, "", 2, f"127.0.0.1:{taken.getsockname()[1]}")
    assert outcome == Outcome(0), shown
    assert any("a port of this job was taken" in line for line in shown)
    assert shown[-1] == "met 4"


def test_paddle_launch_with_one_rank_trains_for_real(tmp_path: Path, small: list[str]) -> None:
    command = [
        sys.executable,
        "-m",
        "paddle.distributed.launch",
        "--nproc_per_node",
        "1",
        str(ROOT / "gpt" / "main.py"),
    ]
    done = subprocess.run(
        [*command, *small, "hydra.run.dir=run", "trainer.max_steps=2", "cluster.device=cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2]


def test_a_rank_that_is_stopped_in_training_ends_the_job_and_is_named(tmp_path: Path, small: list[str]) -> None:
    job = [*small, "parallel=dp2", "cluster.device=cpu", "trainer.max_steps=100000", "cluster.hang_seconds=15"]
    # Longer than the import of Paddle, during which no rank beats.
    job += ["trainer.eval_every=0", "trainer.save_every=0", "hydra.run.dir=run"]
    with open(tmp_path / "said", "w+") as said:
        driver = subprocess.Popen(
            [sys.executable, "-m", "gpt.main", *job],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for(
                lambda: '"step": 20,' in text_of(tmp_path / "run" / "metrics.jsonl") or driver.poll() is not None, 60
            )
            assert driver.poll() is None, text_of(tmp_path / "said")
            workers = {number_of(pid, "PADDLE_TRAINER_ID"): pid for pid in children(driver.pid)}
            os.kill(workers[1], signal.SIGSTOP)
            assert driver.wait(60) == 3
        finally:
            driver.kill()
            driver.wait()
    text = text_of(tmp_path / "said")
    assert "no rank made progress for 15 s (cluster.hang_seconds)" in text
    assert ". Rank 1 is stopped by a signal (SIGSTOP)" in text
    assert "most recent call first" in text_of(tmp_path / "run" / "logs" / "worker.0.log")
    wait_for(lambda: not any(map(alive, workers.values())))


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def children(pid: int) -> list[int]:
    return [int(child) for child in text_of(Path(f"/proc/{pid}/task/{pid}/children")).split()]


def number_of(pid: int, variable: str) -> int:
    """From a process's environment; -1 if it is not there."""
    for entry in Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0"):
        if entry.startswith(f"{variable}="):
            return int(entry.partition("=")[2])
    return -1
