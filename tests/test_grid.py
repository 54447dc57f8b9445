"""A grid runs: what is done is skipped, what fails is told, what is stopped goes on. A script plays most cells."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import pytest
from conftest import SMALL, Ran, metrics
from played import PLAYER, cells

from gpt.runs import run_dir
from gpt.runs.grid import Cell, Folder, State
from gpt.utils.console import Console
from gpt.utils.errors import JobFailed, UserError
from launchers.sweep import launch, local_runner
from launchers.sweep.display import CellOutcome
from launchers.sweep.local_runner import Live

Run = Callable[..., Ran]


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cells are played; the folder that all is in."""
    player = tmp_path / "player"
    player.write_text(PLAYER)
    player.chmod(0o755)
    monkeypatch.setattr(local_runner.sys, "executable", str(player))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # slots are shared by user and host
    monkeypatch.setattr(local_runner, "SHOW_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(some: list[Cell], **more: Any) -> dict[str, CellOutcome]:
    return local_runner.run(some, Folder(Path("outputs/grids/g")), ["a", "command"], Console(), **more)


def states(outcomes: dict[str, CellOutcome]) -> list[str]:
    return [outcome.state for outcome in outcomes.values()]


def starts(name: str) -> int:
    events = Folder(Path("outputs/grids/g")).events()
    return sum(event["event"] == "started" and event["cell"] == name for event in events)


# --- what runs, and what does not ---


def test_what_is_done_is_skipped_what_failed_is_tried_again_and_a_grid_grows(
    played: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = start(cells(1, 13))
    assert states(outcomes) == ["done", "failed"]
    assert [outcome.code for outcome in outcomes.values()] == [0, 3]
    said = capsys.readouterr().out
    assert "2: 2 new" in said
    assert "FAILED: seed=13 with exit code 3" in said
    assert "  | the reason" in said
    assert "done: seed=1  val/loss 5.0000" in said

    assert states(start(cells(1, 2, 13))) == ["done before", "done", "failed"]
    assert "3: 1 new, 1 done before, 1 failed before, again" in capsys.readouterr().out
    assert (starts("run_1"), starts("run_2"), starts("run_13")) == (1, 1, 2)

    grid = Folder(Path("outputs/grids/g")).read()
    assert grid["command"] == ["a", "command"]
    assert set(grid["cells"]) == {"run_1", "run_2", "run_13"}
    assert Path("outputs/grids/g", grid["cells"]["run_1"]["run_dir"]).resolve() == Path("outputs/run_1").resolve()
    ended = [event for event in Folder(Path("outputs/grids/g")).events() if event["event"] == "ended"]
    assert [event["code"] for event in ended if event["cell"] == "run_13"] == [3, 3]


def test_retries_and_fail_fast(played: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert states(start(cells(13, more=("grid.retries=2",)))) == ["failed"]
    assert starts("run_13") == 3
    assert capsys.readouterr().out.count("tried again") == 2
    outcomes = start(cells(13, 15, 1, 2, 3, 4, more=("grid.fail_fast=true", "grid.slots=2")))
    assert states(outcomes)[:2] == ["failed", "stopped"]
    assert states(outcomes)[-1] == "not started"
    assert all(outcome.bad for outcome in outcomes.values() if outcome.state != "done")


def test_a_stopped_grid_says_so_and_goes_on(played: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sent: list[Live] = []

    def watch(live: list[Live]) -> None:
        if not sent and live and all(each.record.get("step") == 3 for each in live):
            sent.extend(live)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(JobFailed, match="the same command goes on") as stopped:
        start(cells(15, 1, more=("grid.slots=1",)), watch=watch)
    assert stopped.value.code == 130
    said = capsys.readouterr().out
    assert "stopped by SIGINT; 1 running, which save and end" in said
    assert "2 cells: 1 not started, 1 stopped" in said
    folder, last = Folder(Path("outputs/grids/g")), Folder(Path("outputs/grids/g")).last_events()
    assert [folder.state(cell, last.get(cell.name, {})) for cell in cells(15, 1)] == [State.interrupted, State.new]


def test_a_sweeper_sees_what_runs_and_can_end_one_and_start_the_next_batch(played: Path) -> None:
    seen: list[float] = []

    def watch(live: list[Live]) -> None:
        for each in live:
            if each.cell.config.seed == 15 and each.record.get("step") == 3:
                seen.append(each.record["val/loss"])
                each.prune()

    outcomes = start(cells(15, 1), watch=watch)
    assert states(outcomes) == ["pruned", "done"]
    assert seen[0] == 19.0
    assert [e["event"] for e in Folder(Path("outputs/grids/g")).events() if e["cell"] == "run_15"] == [
        "started",
        "pruned",
    ]
    start(cells(2), first=False)
    assert set(Folder(Path("outputs/grids/g")).read()["cells"]) == {"run_15", "run_1", "run_2"}
    pruned, done = (launch._returned(cell, outcomes[cell.name]) for cell in cells(15, 1))
    assert (pruned.return_value, done.return_value) == (4.5, 5.0)


def test_failed_cells_are_told_to_sweepers_as_hydra_wants_it(played: Path) -> None:
    some = cells(1, 13)
    outcomes = start(some)
    returns = [launch._returned(cell, outcomes[cell.name]) for cell in some]
    assert returns[0].return_value == 5.0
    with pytest.raises(JobFailed, match="seed=13: failed"):
        returns[1].return_value  # noqa: B018
    with pytest.raises(JobFailed, match="1 of 2 cells are not done; the same command tries them again") as ended:
        launch.raise_for_failures(returns)
    assert ended.value.code == 1
    launch.raise_for_failures(returns[:1])


def test_cells_that_another_driver_runs_are_left_alone_and_named(
    played: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = run_dir.lock_of(Path("outputs/run_1"))
    assert theirs.acquire()
    outcomes = start(cells(1, 2))
    assert states(outcomes) == ["elsewhere", "done"]
    said = capsys.readouterr().out
    assert "1 running elsewhere" in said
    assert "still running elsewhere: seed=1" in said
    assert starts("run_1") == 0
    assert not outcomes["run_1"].bad


def test_a_cell_that_another_driver_finished_meanwhile_is_not_started_again(played: Path) -> None:
    runner = local_runner.Runner(cells(1), Folder(Path("outputs/grids/g")), Console(), None)
    runner.folder.add(cells(1), [])
    entries = runner.look()  # it is new
    start(cells(1))  # somebody else is quicker
    runner.run(entries)
    assert states(runner.outcomes) == ["done elsewhere"]
    assert starts("run_1") == 1


def test_an_evaluation_is_repeated_only_when_there_is_a_newer_checkpoint(played: Path) -> None:
    (Path("outputs/run_1/checkpoints")).mkdir(parents=True)
    some = cells(1, more=("task=evaluate", "checkpoint=outputs/run_1"))
    assert some[0].name.startswith("run_1_evaluate_")
    assert states(start(some)) == ["done"]
    assert states(start(some)) == ["done before"]
    later = time.time() + 10
    os.utime("outputs/run_1/checkpoints", (later, later))
    assert states(start(some)) == ["done"]


# --- the command itself ---


def wait_until(what: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_grid_that_is_killed_twice_and_grown_ends_complete_with_nothing_trained_twice(
    gpt: Run, text: Path, tmp_path: Path
) -> None:
    """Ten cells of one and two ranks, of which one fails until the reason is gone."""
    command = ["-m", *SMALL, "data=text", f"data.path={text}", "trainer.max_steps=12", "trainer.eval_every=0"]
    command += ["grid.slots=4", "grid.name=g", "parallel=single,dp2", "seed=1,2,3,4,5"]
    env = {"TMPDIR": str(tmp_path)}  # slots of its own
    folder, outputs = Folder(tmp_path / "outputs" / "grids" / "g"), tmp_path / "outputs"

    def driver() -> harness.Command:
        return harness.Command(command, tmp_path, {**os.environ, **env}, Path(os.devnull), Path(os.devnull))

    def records() -> int:
        return sum(len(run_dir.read_metrics(run)) for run in outputs.glob("tiny_*"))

    killed = driver()
    wait_until(lambda: records() > 8)
    os.kill(killed.pid, signal.SIGKILL)  # its cells save and end
    killed.wait(60)
    stopped, before = driver(), records()  # at once: it takes over what those let go of
    wait_until(lambda: sum(e["event"] == "ended" for e in folder.events()) >= 1 and records() > before)
    os.kill(stopped.pid, signal.SIGTERM)
    assert stopped.wait(120) == 143
    assert not any(run_dir.is_locked(run) for run in outputs.glob("tiny_*"))
    ten = folder.read()["cells"]
    assert len(ten) == 10

    bad = next(outputs / name for name in ten if not (outputs / name).exists())
    bad.mkdir()
    (bad / "logs").write_text("a file where a folder must be")
    third = gpt(*command, env=env, timeout=300)
    assert third.code == 1, third.text
    assert "1 of 10 cells are not done; the same command tries them again" in third.err
    assert "FAILED: " in third.out
    assert "File exists" in third.out
    (bad / "logs").unlink()
    grown = gpt(*command[:-1], "seed=1,2,3,4,5,6", env=env, timeout=300)
    assert grown.code == 0, grown.text
    assert "12: 2 new, 9 done before, 1 failed before, again" in grown.out
    assert len(folder.read()["cells"]) == 12

    for name in folder.read()["cells"]:
        assert [record["step"] for record in metrics(outputs / name)] == list(range(1, 13)), name
        assert json.loads((outputs / name / "result.json").read_text())["status"] == "done"
        events = [(event["event"], event.get("code")) for event in folder.events() if event["cell"] == name]
        assert ("ended", 0) not in events[:-1], events  # nothing was started after it was done


def test_a_cell_is_a_job_without_data_and_files_of_the_version_before_are_read(tmp_path: Path) -> None:
    (cell,), file = cells(1), tmp_path / "cell.json"
    cell.save(file)
    stored = json.loads(file.read_text())
    assert set(stored) == {"config", "run_dir", "command", "differs"}
    assert Cell.load(file) == replace(cell, run_dir=cell.run_dir.resolve())
    overrides = stored.pop("command")[3:]
    file.write_text(json.dumps({**stored, "overrides": overrides}))
    assert Cell.load(file).overrides == cell.overrides
    del stored["config"]["model"]["hidden"]
    file.write_text(json.dumps({**stored, "overrides": overrides}))
    with pytest.raises(UserError, match=r"(?s)not a frozen command of this version \(.*hidden.*type it again"):
        Cell.load(file)
