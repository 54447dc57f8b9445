"""Jobs whose ranks were started by a launcher: who we are, how the ranks find each other, and how the job ends.

Real commands of ours in the middle; the workers are a few lines of Python without Paddle.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from test_signals import alive, wait_for

from launchers import rank_env

# --- our command, started once per rank ---

# The command as it is, but "python -m gpt.worker" is a script of the test's own.
COMMAND = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.executable = {{worker!r}}
from gpt import main
from launchers import driver
main.main()
"""
WORKER = f"""#!{sys.executable}
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
sys.argv[:] = sys.argv[2:]
from gpt import worker
from gpt.utils import files, heartbeat, signals
run_dir, job_file = Path(sys.argv[1]), Path(sys.argv[2])
rank, world = int(os.environ["PADDLE_TRAINER_ID"]), int(os.environ["PADDLE_TRAINERS_NUM"])
worker.ORPHAN_SECONDS = 1.0
worker.start_monitoring()
signals.Signals()
files.write_json(run_dir / f"rank{{rank}}.json", dict(os.environ, PID=str(os.getpid())))
def result():
    if rank == 0:
        (run_dir / "result.json").write_text('{{"status": "done", "step": 12, "val/loss": 1.0}}')
        (run_dir / "metrics.jsonl").write_text("")
"""
CALL = "    return 0\n\nworker.run_to_exit(body)\n"
SECRET = "a-key-that-must-not-be-written"


class Ranks:
    """A job of two processes, as a launcher would start them."""

    def __init__(self, folder: Path, small: list[str]) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.arguments = [*small, "parallel=dp2", "cluster.device=cpu", "hydra.run.dir=run"]
        self.processes: list[subprocess.Popen[str]] = []

    def script(self, body: str) -> str:
        """Write worker and command; the command's file."""
        worker, command = self.folder / "worker", self.folder / "command.py"
        worker.write_text(WORKER + textwrap.indent(body, "    ").join(("def body():\n", CALL)))
        worker.chmod(0o755)
        command.write_text(COMMAND.format(worker=str(worker)))
        return str(command)

    def start(self, body: str, envs: list[dict[str, str]], *more: str) -> None:
        """A process per environment; rank 0 last, so that others have to wait for it."""
        command = [sys.executable, self.script(body), *self.arguments, *more]
        for env in reversed(envs):
            self.processes.insert(
                0,
                subprocess.Popen(
                    command,
                    cwd=self.folder,
                    env={**os.environ, "WANDB_API_KEY": SECRET, **env},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                ),
            )

    def ends(self, seconds: float = 60) -> list[tuple[int, str]]:
        """Exit codes and what was said, by rank."""
        said = [process.communicate(timeout=seconds)[0] for process in self.processes]
        return [(process.returncode, text) for process, text in zip(self.processes, said, strict=True)]

    def none_is_left(self) -> None:
        """Every worker that began has ended, or does soon."""
        pids = [int(json.loads(path.read_text())["PID"]) for path in self.run_dir.glob("rank*.json")]
        assert pids
        wait_for(lambda: not any(map(alive, pids)))

    def end(self) -> None:
        """Whatever became of it."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture
def ranks(tmp_path: Path, small: list[str]) -> Iterator[Ranks]:
    group = Ranks(tmp_path, small)
    yield group
    group.end()


def as_paddle(count: int = 2) -> list[dict[str, str]]:
    return [place.variables() for place in rank_env.here(count, gpu=False)]


def as_mpi(count: int = 2) -> list[dict[str, str]]:
    namespace = f"test-{os.getpid()}-{time.monotonic_ns()}"
    return [
        {
            "OMPI_COMM_WORLD_RANK": str(rank),
            "OMPI_COMM_WORLD_SIZE": str(count),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
            "OMPI_COMM_WORLD_LOCAL_SIZE": str(count),
            "PMIX_NAMESPACE": namespace,
        }
        for rank in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("starter", [as_paddle, as_mpi])
def test_ranks_started_by_others_run_one_job(ranks: Ranks, starter: Callable[[], list[dict[str, str]]]) -> None:
    ranks.start("print('rank', rank, flush=True)\nresult()\n", starter())
    (lead, said), (other, quiet) = ranks.ends()
    assert (lead, other) == (0, 0), said + quiet
    assert "rank 0" in said
    assert "2 = dp 2" in said
    assert quiet == ""
    envs = [json.loads((ranks.run_dir / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [env["PADDLE_TRAINER_ID"] for env in envs] == ["0", "1"]
    assert [int(env["PID"]) for env in envs] == [process.pid for process in ranks.processes]  # nothing in between
    for name in ("PADDLE_MASTER", "PADDLE_TRAINER_ENDPOINTS", "PADDLE_TRAINERS_NUM"):
        assert envs[0][name] == envs[1][name]
    assert all(env["OMP_NUM_THREADS"] for env in envs)
    assert (ranks.run_dir / "logs" / "worker.1.log").read_text() == "rank 1\n"
    assert len(list(ranks.folder.glob("**/job.json"))) == 1
    for env in ranks.run_dir.glob("rank*.json"):
        env.unlink()  # the test's own
    for path in ranks.run_dir.rglob("*"):
        assert path.is_dir() or SECRET not in path.read_text(errors="replace"), path

    ranks.processes.clear()
    ranks.start("sys.exit(9)\n", starter())  # nobody starts a worker for a run that is done
    ends = ranks.ends()
    assert [code for code, _ in ends] == [0, 0], ends
    assert "this run is done" in ends[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sys.exit(7)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_rank_that_fails_ends_the_job_and_is_shown_by_rank_0(ranks: Ranks, how: str) -> None:
    ranks.start(f"if rank:\n    print('the cause', flush=True)\n    {how}\ntime.sleep(600)\n", as_paddle())
    (lead, said), (other, _) = ranks.ends()
    assert "the cause" in said
    assert "Traceback" not in said
    if "exit" in how:
        assert (lead, other) == (7, 7)
        assert "worker 1 ended with exit code 7" in said
    else:
        assert (lead, other) == (1, -9)
        assert "the process of rank 1 vanished: it was killed" in said


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_vanishes_ends_the_others(ranks: Ranks, victim: int) -> None:
    ranks.start("time.sleep(600)\n", as_paddle())
    wait_for(lambda: len(list(ranks.run_dir.glob("rank*.json"))) == 2, 60)
    ranks.processes[victim].kill()
    ends = ranks.ends()
    assert ends[victim][0] == -9
    assert ends[1 - victim][0] > 0
    if victim:
        assert "the process of rank 1 vanished" in ends[0][1]
    ranks.none_is_left()


@pytest.mark.slow
def test_a_signal_to_all_ranks_lets_their_workers_save(ranks: Ranks) -> None:
    body = (
        "def save(number, frame):\n"
        "    time.sleep(0.5 + rank)\n"
        "    (run_dir / f'saved{rank}').write_text('')\n"
        "    sys.exit(128 + number)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "(run_dir / f'rank{rank}.ready').write_text('')\n"
        "time.sleep(600)\n"
    )
    ranks.start(body, as_paddle())
    wait_for(lambda: len(list(ranks.run_dir.glob("rank*.ready"))) == 2, 60)
    for process in ranks.processes:
        process.terminate()
    assert [code for code, _ in ranks.ends()] == [143, 143]
    assert len(list(ranks.run_dir.glob("saved*"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("noticed_by", ["the watchdog", "Gloo"])
def test_a_hang_is_ended_by_rank_0_for_all(ranks: Ranks, noticed_by: str) -> None:
    body = (
        "heartbeat.beat(4, 'forward')\n"
        "if rank == 0: heartbeat.beat(4, 'reduce')\n"
        f"time.sleep(1 if rank == 0 and {noticed_by!r} == 'Gloo' else 600)\n"
        "raise RuntimeError('gloo/transport/tcp/unbound_buffer.cc:80] TIMEOUT self_rank = none pair_rank = -1')\n"
    )
    ranks.start(body, as_paddle(), f"cluster.hang_seconds={2 if noticed_by == 'the watchdog' else 600}")
    (lead, said), (other, _) = ranks.ends()
    assert (lead, other) == (3, 3), said
    assert "Rank 1 did not arrive: rank 1 at step 4 (forward); rank 0 at step 4 (reduce)" in said


REFUSED = {
    "world": (["parallel=dp2_mp2"], 2, "started 2 rank(s), but the degrees of parallel need 4 = dp 2 x mp 2: start 4"),
    "grid": (["-m", "seed=1,2"], 2, "a grid (-m) cannot run inside a job that paddle.distributed.launch started"),
    "typo": (["model.hiden=3"], 2, "unknown key model.hiden (did you mean model.hidden?)"),
    "plan": (["task=plan"], 0, "parameters"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_rank_0_refuses_or_needs_no_ranks_ends_all_with_one_message(ranks: Ranks, case: str) -> None:
    more, code, words = REFUSED[case]
    ranks.start("", as_paddle(), *more)
    (lead, said), (other, quiet) = ranks.ends()
    assert (lead, other) == (code, code), said + quiet
    assert words in said
    assert "Traceback" not in said + quiet
    assert quiet == ""
    assert not code or not ranks.run_dir.exists()


@pytest.mark.slow
def test_started_alone_the_command_starts_every_rank_and_shows_who_failed(ranks: Ranks) -> None:
    ranks.start("print('here is rank', rank, flush=True)\nresult()\n", [{}])
    ((code, said),) = ranks.ends()
    assert code == 0, said
    assert "here is rank 0" in said
    assert "here is rank 1" not in said
    ranks.processes.clear()
    (ranks.run_dir / "result.json").unlink()
    ranks.start("if rank == 0: time.sleep(600)\nprint('the cause', flush=True)\nsys.exit(7)\n", [{}])
    ((code, said),) = ranks.ends()
    assert code == 7
    log = ranks.run_dir / "logs" / "worker.1.log"
    assert said.endswith(f"worker 1 ended with exit code 7; its log: {log}\n  | the cause\n")
    assert "Traceback" not in said


# --- the real one ---


def paddle_launch(ranks: Ranks, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "paddle.distributed.launch", *options, str(ranks.folder / "command.py")]
    process = subprocess.Popen(
        [*command, *ranks.arguments],
        cwd=ranks.folder,
        env={**os.environ, "WANDB_API_KEY": SECRET},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    ranks.processes.append(process)
    return process


@pytest.mark.slow
def test_started_by_paddle_launch(ranks: Ranks) -> None:
    ranks.script("print('here is rank', rank, flush=True)\nresult()\n")
    paddle_launch(ranks, "--nproc_per_node", "2", "--log_dir", "log")
    ((code, said),) = ranks.ends()
    assert code == 0, said
    assert "here is rank 0" in said
    assert {p.name for p in ranks.run_dir.glob("rank*.json")} == {"rank0.json", "rank1.json"}
    exposed = [p.name for p in (ranks.folder / "log").iterdir() if SECRET in p.read_text() and p.stat().st_mode & 0o077]
    assert exposed == []


@pytest.mark.slow
def test_started_by_paddle_launch_on_two_nodes(ranks: Ranks) -> None:
    ranks.script("print('here is rank', rank, flush=True)\nresult()\n")
    master = f"127.0.0.1:{rank_env.free_ports(1)[0]}"
    for node in ("0", "1"):
        paddle_launch(ranks, "--nnodes", "2", "--nproc_per_node", "1", "--master", master, "--rank", node,
                      "--log_dir", f"log{node}")  # fmt: skip
    ends = ranks.ends()
    assert [code for code, _ in ends] == [0, 0], ends
    assert {p.name for p in ranks.run_dir.glob("rank*.json")} == {"rank0.json", "rank1.json"}
    second = json.loads((ranks.run_dir / "rank1.json").read_text())
    assert (second["PADDLE_NNODES"], second["PADDLE_LOCAL_RANK"]) == ("2", "0")
