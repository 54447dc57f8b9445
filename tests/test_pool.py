"""Jobs side by side on slots: none too many, none starved, none left behind. The jobs are sleeps and a few lines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from gpt.utils.files import Lock
from launchers.sweep import pool as sweep_pool
from launchers.sweep.pool import Pool, PoolJob, Running
from launchers.sweep.slots import Slots


class Noted:
    """A watcher that remembers; what it does is put in by a test."""

    def __init__(self) -> None:
        self.starts: list[str] = []
        self.ends: list[tuple[str, int]] = []
        self.seen: list[str] = []
        self.again: Callable[[Running, int], bool] = lambda job, code: False
        self.look: Callable[[list[Running]], None] = lambda running: None
        self.todo: Callable[[PoolJob], bool] = lambda entry: True

    def wanted(self, entry: PoolJob) -> bool:
        return self.todo(entry)

    def started(self, job: Running) -> None:
        self.starts.append(job.entry.name)

    def ended(self, job: Running, code: int) -> bool:
        self.ends.append((job.entry.name, code))
        return self.again(job, code)

    def held_by_other(self, entry: PoolJob) -> None:
        self.seen.append(entry.name)

    def poll(self, running: list[Running], waiting: list[PoolJob]) -> None:
        self.look(running)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_pool, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(sweep_pool, "ELSEWHERE_SECONDS", 0.05)


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Pool]:
    """A pool of so many slots; several of one test share them."""

    def make(count: int = 4) -> Pool:
        return Pool(Slots(count, gpu=False, folder=tmp_path / "slots"), Noted())

    return make


@pytest.fixture
def entry(tmp_path: Path) -> Callable[..., PoolJob]:
    """A job that sleeps, or runs a line of shell."""

    def make(name: str, slots: int = 1, does: str = "sleep 0.05", lock: str = "") -> PoolJob:
        command = ["sh", "-c", does]
        return PoolJob(name, command, slots, tmp_path / f"{name}.log", Lock(tmp_path / f"{lock or name}.lock"))

    return make


def noted(pool: Pool) -> Noted:
    assert isinstance(pool.listener, Noted)
    return pool.listener


def until(pools: list[Pool], over: Callable[[], bool]) -> None:
    """Let drivers take turns."""
    deadline = time.monotonic() + 30
    while not over():
        assert time.monotonic() < deadline
        for pool in pools:
            pool.step()


def test_never_more_than_the_slots_and_no_slot_twice_also_with_two_drivers(
    made: Callable[..., Pool], entry: Callable[..., PoolJob]
) -> None:
    drivers = [made(), made()]
    for number, driver in enumerate(drivers):
        driver.add([entry(f"{number}-{i}", slots=1 + i % 3) for i in range(8)])

    def over() -> bool:
        used = [slot for driver in drivers for job in driver.running for slot in job.lease.numbers]
        assert len(used) == len(set(used)) <= 4
        assert all(len(job.lease.numbers) == job.entry.slots for driver in drivers for job in driver.running)
        return not any(driver.running or driver.waiting for driver in drivers)

    until(drivers, over)
    assert sorted(noted(drivers[0]).starts + noted(drivers[1]).starts) == sorted(
        f"{d}-{i}" for d in (0, 1) for i in range(8)
    )


def test_small_jobs_fill_what_a_large_one_leaves(made: Callable[..., Pool], entry: Callable[..., PoolJob]) -> None:
    pool = made()
    pool.add([entry("one"), entry("three", slots=3), entry("other three", slots=3)])
    pool.step()
    assert noted(pool).starts == ["three", "one"]  # the largest first, and beside it what fits
    until([pool], lambda: not pool.running and not pool.waiting)


def test_two_jobs_of_one_run_are_never_at_work_together(
    made: Callable[..., Pool], entry: Callable[..., PoolJob]
) -> None:
    pool, most = made(), 0
    pool.add([entry("val", lock="run"), entry("test", lock="run"), entry("other")])

    def over() -> bool:
        nonlocal most
        most = max(most, len([job for job in pool.running if job.entry.name != "other"]))
        return not pool.running and not pool.waiting

    until([pool], over)
    assert most == 1
    assert noted(pool).seen == []  # it waits for its own; nobody else has it
    assert len(noted(pool).ends) == 3


def test_what_another_runs_is_left_alone_and_taken_over_when_it_is_free(
    made: Callable[..., Pool], entry: Callable[..., PoolJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_pool, "ELSEWHERE_SECONDS", 1e9)  # the look at the very end is enough
    theirs, done = Lock(tmp_path / "a.lock"), Lock(tmp_path / "b.lock")
    assert theirs.acquire()
    assert done.acquire()
    pool = made()
    noted(pool).todo = lambda each: each.name != "b"  # they have done it

    def again(job: Running, code: int) -> bool:
        if job.entry.name == "c":
            theirs.release()
            done.release()
        return False

    noted(pool).again = again
    pool.run([entry("a"), entry("b"), entry("c")])
    assert noted(pool).seen == ["a", "b"]
    assert sorted(noted(pool).starts) == ["a", "c"]
    assert pool.held_by_others == []
    assert theirs.acquire()
    pool = made()
    pool.run([entry("a")])
    assert [each.name for each in pool.held_by_others] == ["a"]
    assert noted(pool).starts == []


def test_a_failed_job_is_tried_again_if_its_watcher_says_so(
    made: Callable[..., Pool], entry: Callable[..., PoolJob]
) -> None:
    pool = made()
    noted(pool).again = lambda job, code: bool(code) and job.entry.attempt < 3
    pool.run([entry("bad", does="exit 3"), entry("good")])
    assert noted(pool).starts.count("bad") == 3
    assert noted(pool).ends.count(("bad", 3)) == 3
    assert ("good", 0) in noted(pool).ends


STUBBORN = "trap 'exit 130' INT; trap 'exit 143' TERM; echo ready; while :; do sleep 0.01; done"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_passed_on_and_what_waits_is_not_started(
    number: signal.Signals, code: int, made: Callable[..., Pool], entry: Callable[..., PoolJob], tmp_path: Path
) -> None:
    pool, sent, before = made(), False, signal.getsignal(number)

    def look(running: list[Running]) -> None:
        nonlocal sent
        if not sent and all("ready" in job.entry.log.read_text() for job in running):
            sent = True
            signal.raise_signal(number)

    noted(pool).look = look
    pool.run([entry("one", slots=2, does=STUBBORN), entry("two", slots=2, does=STUBBORN), entry("late", slots=2)])
    assert noted(pool).ends in ([("one", code), ("two", code)], [("two", code), ("one", code)])
    assert pool.stopped_by is number
    assert "late" not in noted(pool).starts
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_what_does_not_end(
    made: Callable[..., Pool], entry: Callable[..., PoolJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_pool, "END_SECONDS", 0.1)
    pool, sent, rounds = made(), 0, 0

    def look(running: list[Running]) -> None:
        nonlocal sent, rounds
        rounds += 1
        assert rounds < 1000
        if sent < 2 and all("ready" in job.entry.log.read_text() for job in running):
            sent += 1
            signal.raise_signal(signal.SIGINT)

    noted(pool).look = look
    pool.run([entry("deaf", does="trap '' INT TERM; echo ready; while :; do sleep 0.01; done")])
    assert noted(pool).ends == [("deaf", -signal.SIGKILL)]


def test_one_job_can_be_ended_while_the_others_go_on(made: Callable[..., Pool], entry: Callable[..., PoolJob]) -> None:
    pool = made(1)

    def look(running: list[Running]) -> None:
        for job in running:
            if job.entry.name == "bad" and "ready" in job.entry.log.read_text():
                job.prune()

    noted(pool).look = look
    pool.run([entry("bad", does=STUBBORN), entry("good")])
    assert noted(pool).ends == [("bad", 143), ("good", 0)]


JOB = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from gpt.utils import launch_env, signals
def save(number, frame):
    time.sleep(0.6)  # while its driver is dead already
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
signals.die_with_parent(launch_env.WorkerEnv.from_env(os.environ).parent)
print("ready", os.getpid(), flush=True)
time.sleep(60)
"""
DRIVER = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from test_pool import Noted
from gpt.utils.files import Lock
from launchers.sweep.pool import Pool, PoolJob
from launchers.sweep.slots import Slots
folder = Path(sys.argv[1])
entry = PoolJob("job", [sys.executable, "-c", sys.argv[2]], 2, folder / "job.log", Lock(folder / "run.lock"))
Pool(Slots(4, gpu=False, folder=folder / "slots"), Noted()).run([entry])
"""


def test_locks_survive_a_killed_driver_until_its_job_has_saved(tmp_path: Path) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path), JOB])
    log, deadline = tmp_path / "job.log", time.monotonic() + 30
    while not log.exists() or "ready" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    slots, run = Slots(4, gpu=False, folder=tmp_path / "slots"), Lock(tmp_path / "run.lock")
    assert slots.take(3) is None
    assert not run.acquire()
    others = slots.take(2)
    assert others
    assert run.acquire(patience=10)
    assert slots.take(2)  # the job's are free with it


def test_a_job_has_as_many_cores_per_slot_whichever_slots_it_gets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(10, 18)))
    two = Slots(4, gpu=False, folder=tmp_path)
    assert [two.cores([slot]) for slot in range(4)] == [(10, 11), (12, 13), (14, 15), (16, 17)]
    assert two.cores([0, 3]) == (10, 11, 16, 17)
    shared = Slots(16, gpu=False, folder=tmp_path)
    assert shared.cores([1]) == shared.cores([9]) == (11,)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    gpus = Slots(3, gpu=True, folder=tmp_path)
    assert (gpus.visible_gpus([0, 2]), gpus.cores([0, 2])) == ({"CUDA_VISIBLE_DEVICES": "4,7"}, ())
