"""However the driver ends, no process of its job is left: stand-in workers without Paddle, real signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

DRIVER = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from launchers import local, rank_env
from gpt.utils.launch_env import WorkerEnv
env = dict(os.environ, **WorkerEnv(parent=os.getpid()).to_env())
here = Path(sys.argv[1]).parent
outcome = local.run_workers(
    [sys.argv[1], str(here)], lambda: rank_env.here(3, gpu=False), here / "logs", env, show=print, poll=lambda: None
)
sys.exit(outcome.code if outcome.code >= 0 else 128 - outcome.code)
"""
SLEEPER = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
rank = os.environ["PADDLE_TRAINER_ID"]
from gpt.utils import launch_env, signals
signals.die_with_parent(launch_env.WorkerEnv.from_env(os.environ).parent)
open(sys.argv[0] + "." + rank, "w").write(str(os.getpid()))
time.sleep(600)
"""
# Its signals change nothing, as in a collective that another rank never enters.
DEAF = SLEEPER.replace(
    "signals.die_with_parent",
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nfrom gpt import worker\n"
    "worker.ORPHAN_SECONDS = 1.0\nworker.start_monitoring() #",
)


def alive(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_however_the_driver_ends(tmp_path: Path, number: signal.Signals) -> None:
    code, workers = ended(tmp_path, SLEEPER, number)
    assert code == (-9 if number is signal.SIGKILL else 128 + number)
    wait_for(lambda: not any(map(alive, workers)))


def test_a_rank_that_cannot_hear_a_signal_does_not_outlive_a_killed_driver(tmp_path: Path) -> None:
    code, workers = ended(tmp_path, DEAF, signal.SIGKILL)
    assert code == -9
    time.sleep(0.3)
    assert all(map(alive, workers))  # time to save
    wait_for(lambda: not any(map(alive, workers)))
    assert all((tmp_path / "logs" / f"worker.{rank}.heartbeat").exists() for rank in range(3))


def ended(folder: Path, worker: str, number: signal.Signals) -> tuple[int, list[int]]:
    """Send a signal to a driver once its three workers are there; its exit code, and their process ids."""
    script = folder / "standin.py"
    script.write_text(worker)
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(script)])
    files = [folder / f"standin.py.{rank}" for rank in range(3)]
    wait_for(lambda: all(f.exists() and f.read_text() for f in files))
    driver.send_signal(number)
    return driver.wait(30), [int(f.read_text()) for f in files]


def wait_for(what: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)
