"""How a job becomes processes and ends: places, first failures, ports, hangs, devices.

The workers here are a few lines of Python without Paddle, so that a promise takes a second to keep.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, configured
from test_signals import alive

from gpt.config.cluster import Device
from gpt.config.derived import replace_in
from gpt.utils import heartbeat, machine
from gpt.utils import outcome as launchers_outcome
from gpt.utils.heartbeat import Beat
from gpt.utils.outcome import Outcome, root_cause
from gpt.utils.watchdog import Watchdog, missing, named
from launchers import checks, local, rank_env

HEAD = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
rank = int(os.environ["PADDLE_TRAINER_ID"])
"""


@pytest.fixture
def standin(tmp_path: Path) -> Callable[[str], str]:
    """Writes a worker, whose body knows its ``rank``."""

    def write(body: str) -> str:
        path = tmp_path / "standin.py"
        path.write_text(HEAD + body, encoding="utf-8")
        return str(path)

    return write


def launched(script: str, ranks: int = 2, **more: Any) -> tuple[Outcome, list[str], float]:
    """Run it on so many ranks; the outcome, what rank 0 showed, and the seconds."""
    shown: list[str] = []
    begin = time.monotonic()
    settings: dict[str, Any] = {"poll": lambda: None, "places": lambda: rank_env.here(ranks, gpu=False), **more}
    choose = settings.pop("places")
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    logs = Path(script).parent / "logs"
    outcome = local.run_workers([script], choose, logs, env, show=shown.append, **settings)
    return outcome, shown, time.monotonic() - begin


# --- places and environment ---


def test_every_rank_knows_its_place_and_has_a_port_of_its_own(standin: Callable[[str], str], tmp_path: Path) -> None:
    outcome, shown, _ = launched(standin("print('rank', rank)\n"))
    assert outcome == Outcome(0)
    assert shown == ["rank 0"]  # the others are in their logs
    assert (tmp_path / "logs" / "worker.1.log").read_text() == "rank 1\n"

    several = [place.variables() for place in rank_env.here(4, gpu=False)]
    endpoints = several[0]["PADDLE_TRAINER_ENDPOINTS"].split(",")
    assert len({*endpoints, several[0]["PADDLE_MASTER"]}) == 5
    for rank, variables in enumerate(several):
        assert variables["PADDLE_CURRENT_ENDPOINT"] == endpoints[rank]
        for name in ("PADDLE_TRAINER_ID", "PADDLE_GLOBAL_RANK", "PADDLE_LOCAL_RANK", "PADDLE_RANK_IN_NODE"):
            assert variables[name] == str(rank)
        for name in ("PADDLE_TRAINERS_NUM", "PADDLE_GLOBAL_SIZE", "PADDLE_LOCAL_SIZE"):
            assert variables[name] == "4"
        assert variables["PADDLE_NNODES"] == "1"
        assert variables["PADDLE_DISTRI_BACKEND"] == "gloo"
        assert "FLAGS_selected_gpus" not in variables
    on_gpus = [place.variables() for place in rank_env.here(2, gpu=True)]
    assert [variables["FLAGS_selected_gpus"] for variables in on_gpus] == ["0", "1"]
    assert "PADDLE_DISTRI_BACKEND" not in on_gpus[0]


def test_variables_of_other_jobs_stay_out_and_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PADDLE_MASTER", "PADDLE_TRAINER_ENDPOINTS", "FLAGS_selected_gpus", "POD_IP", "TRAINING_ROLE"):
        monkeypatch.setenv(name, "of another job")
    monkeypatch.setattr(machine, "cores", lambda: 8)
    env = local.environment(configured([]), 4)
    assert "of another job" not in env.values()
    assert env["OMP_NUM_THREADS"] == env["MKL_NUM_THREADS"] == "2"


# --- the first failure ends the job, and is what is shown ---


def test_a_rank_that_fails_ends_the_job_with_its_code_and_last_lines(standin: Callable[[str], str]) -> None:
    script = standin("print('the cause', flush=True) if rank == 1 else time.sleep(600)\nsys.exit(7)\n")
    outcome, shown, seconds = launched(script, 3)
    assert (outcome.code, outcome.rank, outcome.last_lines) == (7, 1, ("the cause",))
    assert shown == []
    assert seconds < 20


def test_a_killed_rank_ends_the_job(standin: Callable[[str], str]) -> None:
    outcome, _, seconds = launched(standin("time.sleep(600 if rank else 0)\nos.kill(os.getpid(), 9)\n"))
    assert (outcome.code, outcome.rank) == (-9, 0)
    assert seconds < 20


def test_of_several_failures_the_first_is_shown(standin: Callable[[str], str], tmp_path: Path) -> None:
    first = str(tmp_path / "first")
    body = f"while rank < 2 and not os.path.exists({first!r}):\n    time.sleep(0.01)\n"
    outcome, _, _ = launched(
        standin(f"{body}open({first!r}, 'w')\ntime.sleep(0.2 * (2 - rank))\nos._exit(4 + rank)\n"), 3
    )
    assert (outcome.code, outcome.rank) == (6, 2)


@pytest.mark.parametrize("delay", [0.0, 1.0])
def test_a_rank_that_lost_its_connection_does_not_hide_the_cause(standin: Callable[[str], str], delay: float) -> None:
    body = (
        "if rank == 0:\n"
        "    print('RuntimeError: Connection closed by peer [127.0.0.1]:2093', flush=True)\n"
        "    sys.exit(1)\n"
        f"time.sleep({delay})\n"
        "print('ValueError: the cause', flush=True)\n"
        "sys.exit(7)\n"
    )
    outcome, shown, _ = launched(standin(body))
    assert (outcome.code, outcome.rank) == (7, 1)
    assert outcome.last_lines == ("ValueError: the cause",)
    assert "Connection closed by peer" in shown[0]


def test_a_lost_connection_without_another_cause_is_shown_in_the_end(
    standin: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launchers_outcome, "VICTIM_SECONDS", 0.5)
    outcome, _, seconds = launched(standin("print('Broken pipe') if rank else time.sleep(600)\nsys.exit(1)\n"))
    assert (outcome.code, outcome.rank) == (1, 1)
    assert 0.5 < seconds < 20


def test_ranks_that_leave_on_purpose_may_finish_saving(standin: Callable[[str], str], tmp_path: Path) -> None:
    body = f"if rank == 0:\n    time.sleep(1)\n    open({str(tmp_path / 'saved')!r}, 'w')\nsys.exit(3)\n"
    outcome, _, _ = launched(standin(body))
    assert outcome.code == 3
    assert (tmp_path / "saved").exists()


def test_a_rank_that_ignores_the_end_is_ended(
    standin: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "END_SECONDS", 0.5)
    ready = str(tmp_path / "ready")
    body = (
        "if rank == 0:\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"    open({ready!r}, 'w').write(str(os.getpid()))\n"
        "    time.sleep(600)\n"
        f"while not os.path.exists({ready!r}):\n    time.sleep(0.01)\n"
        "sys.exit(1)\n"
    )
    outcome, _, seconds = launched(standin(body))
    assert (outcome.code, outcome.rank) == (1, 1)
    assert seconds < 20
    assert not alive(int(Path(ready).read_text()))


def test_blame_goes_to_who_was_first_unless_it_is_a_victim() -> None:
    class Fake:
        def __init__(self, rank: int, code: int | None, ended: float | None, line: str = "") -> None:
            self.rank, self.code, self.ended, self.line = rank, code, ended, line

        def last_lines(self) -> tuple[str, ...]:
            return (self.line,)

        def last_written(self) -> float:
            return 0.0

        def stop(self, number: signal.Signals) -> None: ...

        def wait(self, seconds: float) -> bool:
            return True

    def rank_of(*workers: Fake, now: float = 10.0, sent: signal.Signals | None = None) -> int | None:
        found = root_cause(workers, now, sent)
        return found.rank if found else None

    running = Fake(0, None, None)
    assert rank_of(running, Fake(1, 0, 1.0)) is None
    assert rank_of(running, Fake(1, 1, 9.9)) is None  # others may fail in the same moment
    assert rank_of(running, Fake(1, 1, 9.0)) == 1
    assert rank_of(running, Fake(1, 143, 9.0)) is None
    assert rank_of(running, Fake(1, -15, 9.0), sent=signal.SIGTERM) is None
    assert rank_of(running, Fake(1, 1, 9.0, "Broken pipe")) is None
    assert rank_of(Fake(0, 1, 8.0, "Connection reset by peer"), Fake(1, -9, 9.0)) == 1
    assert rank_of(Fake(0, 1, 8.0, "Connection reset by peer"), Fake(1, -9, 9.0, "Broken pipe")) == 1


# --- ports ---


def test_a_port_that_is_taken_meanwhile_costs_one_more_start(standin: Callable[[str], str]) -> None:
    script = standin(
        "import socket\n"
        "host, port = os.environ['PADDLE_MASTER'].split(':')\n"
        "socket.create_server((host, int(port))) if rank == 0 else time.sleep(0.3)\n"
        "print('met at a free port')\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = f"127.0.0.1:{taken.getsockname()[1]}"
        starts: list[int] = []

        def choose() -> list[rank_env.RankEnv]:
            starts.append(1)
            free = rank_env.here(2, gpu=False)
            return [replace(place, master=port) for place in free] if len(starts) == 1 else free

        outcome, shown, _ = launched(script, places=choose)
        assert outcome == Outcome(0)
        assert len(starts) == 2
        assert any("a port of this job was taken by another program" in line for line in shown)

        starts.clear()
        always, _, _ = launched(script, places=lambda: [replace(p, master=port) for p in rank_env.here(2, gpu=False)])
        assert always.code == 1
        assert always.port_taken


# --- hangs ---


def test_a_hang_ends_with_3_and_names_who_did_not_arrive(standin: Callable[[str], str], tmp_path: Path) -> None:
    body = (
        "from pathlib import Path\n"
        "import faulthandler\n"
        "from gpt.utils import heartbeat\n"
        "faulthandler.register(signal.SIGUSR1)\n"
        "heartbeat.begin(Path(sys.argv[0]).parent / 'logs', rank)\n"
        "for step in range(1, 8):\n"
        "    heartbeat.beat(step, 'forward')\n"
        "    if step == 7 and rank == 1:\n"
        "        time.sleep(600)\n"
        "    heartbeat.beat(step, 'reduce')\n"
        "time.sleep(600)\n"
    )
    logs = tmp_path / "logs"
    dog = Watchdog(logs, 3, 1.0, tmp_path / "metrics.jsonl")

    def poll() -> Outcome | None:
        stuck = dog.stuck()
        return Outcome(3, reason=stuck) if stuck else None

    outcome, _, seconds = launched(standin(body), 3, poll=poll)
    assert outcome.code == 3
    assert "Rank 1 did not arrive: rank 1 at step 7 (forward); ranks 0, 2 at step 7 (reduce)" in outcome.reason
    assert str(logs) in outcome.reason
    assert 1.0 < seconds < 30
    assert "standin.py" in (logs / "worker.1.log").read_text()  # the stack of where it was


def test_the_watchdog_waits_as_long_as_anything_moves(tmp_path: Path) -> None:
    now = [0.0]
    records = tmp_path / "metrics.jsonl"
    dog = Watchdog(tmp_path, 2, 100.0, records, clock=lambda: now[0])
    heartbeat.begin(tmp_path, 0)

    def at(time: float) -> str | None:
        now[0] = time
        return dog.stuck()

    assert at(90) is None
    heartbeat.beat(1, "forward")
    assert at(150) is None
    assert at(240) is None
    records.write_text("{}\n")
    assert at(241) is None
    assert at(300) is None
    assert "Rank 1 did not arrive: rank 1 not begun; rank 0 at step 1 (forward)" in (at(342) or "")
    off = Watchdog(tmp_path, 2, 0, records, clock=lambda: now[0])
    now[0] = 1e9
    assert off.stuck() is None


def test_the_missing_are_named_in_words() -> None:
    assert named([1]) == "rank 1"
    assert named([4, 0, 1, 2]) == "ranks 0-2, 4"
    same = [Beat(2, "save", 9, 0.0)] * 3
    assert missing(same) == "All ranks are at the same place: ranks 0-2 at step 2 (save)"
    assert missing([None, None]) == "All ranks are at the same place: ranks 0-1 not begun"


def test_a_heartbeat_is_whole_at_any_time_and_costs_little(tmp_path: Path) -> None:
    heartbeat.begin(tmp_path, 5)
    begin = time.perf_counter()
    for step in range(1000):
        heartbeat.beat(step, "phase")
        if step % 100 == 0:
            found = heartbeat.read(tmp_path, 5)
            assert found
            assert found.place == (step, step + 1)
    assert time.perf_counter() - begin < 2
    heartbeat.clear(tmp_path)
    assert heartbeat.read(tmp_path, 5) is None


# --- devices ---


def test_more_ranks_than_gpus_are_refused_with_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "paddle_package", lambda: ("paddlepaddle-gpu", "3.3.1"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    config = configured(["parallel=dp8", "trainer.global_batch_size=8", "trainer.micro_batch_size=1"])
    config = replace_in(config, {"cluster.device": Device.gpu})
    (problem,) = checks.problems(config, 8)
    assert problem == (
        "8 ranks need a GPU each, and this host has 2: "
        "of the presets of parallel, dp2, mp2, pp2, sharding2, sharding2_stage2, sharding2_stage3, single fit; "
        "cluster.device=cpu simulates all 8 ranks on the CPU"
    )
    assert checks.problems(config, 2) == []
    config = replace_in(config, {"cluster.device": Device.cpu})
    assert checks.problems(config, 8) == []
