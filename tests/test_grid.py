"""A grid: what is wrong is said first, what is done is skipped, what fails is told. Cells are played by a script."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SMALL, Ran, configured, metrics
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf

from gpt import cli, config, runs
from gpt.config import Config, UserError
from gpt.console import Console
from gpt.grid import board, checks, composing, launching, running
from gpt.grid.board import Line, Outcome
from gpt.grid.cells import Cell, State, label
from gpt.grid.folder import Folder
from gpt.grid.running import Live
from gpt.launching import JobFailed
from launchers import host

Run = Callable[..., Ran]

# What "python -m gpt.frozen FILE" leaves behind; by seed: 13 fails, 14 leaves a trace of nothing, 15 never ends.
PLAYER = f"""#!{sys.executable}
import json, signal, sys, time
from pathlib import Path
cell = json.loads(Path(sys.argv[3]).read_text())
run, seed = Path(cell["run_dir"]), cell["config"]["seed"]
run.mkdir(parents=True, exist_ok=True)
(run / "job.json").write_text("{{}}")
def stop(number, frame):
    (run / "result.json").write_text(json.dumps({{"status": "stopped", "step": 2, "val/loss": 4.5}}))
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
for step in range(1, 4):
    record = {{"step": step, "train/loss": 5.0, "val/loss": 4.0 + seed, "tokens_per_second": 100.0}}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\\n")
if seed == 13:
    print("the reason")
    sys.exit(3)
while seed == 15:
    time.sleep(0.01)
(run / "result.json").write_text(json.dumps({{"status": "done", "step": 12, "val/loss": 4.0 + seed}}))
"""


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cells are started as the script above; the folder that all is in."""
    player = tmp_path / "player"
    player.write_text(PLAYER)
    player.chmod(0o755)
    monkeypatch.setattr(running.sys, "executable", str(player))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # slots are shared by user and host
    monkeypatch.setattr(running, "SHOW_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@functools.cache
def composed_once(more: tuple[str, ...]) -> Config:
    return configured([*SMALL, "data=stdlib", "grid.slots=4", *more])


def cells(*seeds: int, more: tuple[str, ...] = ()) -> list[Cell]:
    """Cells as they are composed."""
    return [
        Cell(
            [f"seed={seed}", *more],
            dataclasses.replace(composed_once(more), seed=seed),
            Path("outputs", f"run_{seed}"),
            [f"seed={seed}"],
        )
        for seed in seeds
    ]


def start(some: list[Cell], **more: Any) -> dict[str, Outcome]:
    return running.run(some, Folder(Path("outputs/grids/g")), ["a", "command"], Console(), **more)


def states(outcomes: dict[str, Outcome]) -> list[str]:
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
    def watch(live: list[Live]) -> None:
        if live and all(each.record.get("step") == 3 for each in live):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(JobFailed, match="the same command goes on") as stopped:
        start(cells(15, 1, more=("grid.slots=1",)), watch=watch)
    assert stopped.value.code == 130
    said = capsys.readouterr().out
    assert "stopped by SIGINT; 1 running, which save and end" in said
    assert "== cells ==" in said
    assert "not started" in said
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
    pruned, done = (launching._returned(cell, outcomes[cell.name]) for cell in cells(15, 1))
    assert (pruned.return_value, done.return_value) == (4.5, 5.0)


def test_failed_cells_are_told_to_sweepers_as_hydra_wants_it(played: Path) -> None:
    some = cells(1, 13)
    outcomes = start(some)
    returns = [launching._returned(cell, outcomes[cell.name]) for cell in some]
    assert returns[0].return_value == 5.0
    with pytest.raises(JobFailed, match="seed=13: failed"):
        returns[1].return_value  # noqa: B018
    with pytest.raises(JobFailed, match="1 of 2 cells are not done; the same command tries them again") as ended:
        launching.conclude(returns)
    assert ended.value.code == 1
    launching.conclude(returns[:1])


def test_cells_that_another_driver_runs_are_left_alone_and_named(
    played: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = runs.lock_of(Path("outputs/run_1"))
    assert theirs.acquire()
    outcomes = start(cells(1, 2))
    assert states(outcomes) == ["elsewhere", "done"]
    said = capsys.readouterr().out
    assert "1 running elsewhere" in said
    assert "still running elsewhere: seed=1" in said
    assert starts("run_1") == 0
    assert not outcomes["run_1"].bad


def test_a_cell_that_another_driver_finished_meanwhile_is_not_started_again(played: Path) -> None:
    runner = running.Runner(cells(1), Folder(Path("outputs/grids/g")), Console(), None)
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


# --- what is shown ---


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_table_fits_the_terminal_also_with_many_cells(width: int) -> None:
    from rich.console import Console as Rich

    record = {"step": 4, "train/loss": 5.25, "tokens_per_second": 1234.0}
    lines = [Line(cell, record, 75.0) for cell in cells(*range(200), more=("model.dropout=0.15",))]
    foot = board.foot([Outcome("running")] * 200 + [Outcome("done before")], 4, 4, 3675.0)
    rich = Rich(width=width, height=24, record=True, file=io.StringIO())
    rich.print(board.table(lines, foot, 24))
    shown = rich.export_text().splitlines()
    assert len(shown) <= 24
    assert all(len(line) <= width for line in shown)
    assert shown[1].split() == ["seed=0", "4/12", "5.250", "1,234", "1:15", "0:02"]  # 8 steps of 8 x 32 tokens
    assert shown[-2].startswith("and 181 more")
    assert shown[-1].startswith("201 cells: 1 done, 200 running | slots 4/4 | 1:01:15")


def test_of_very_many_cells_those_not_done_and_the_best_are_listed(
    played: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = cells(1) * 150
    some = [Cell(c.overrides, c.config, Path("outputs", f"run_{i}"), [f"x={i}"]) for i, c in enumerate(many)]
    outcomes = {cell.name: Outcome("failed" if i == 149 else "done") for i, cell in enumerate(some)}
    for i, cell in enumerate(some):
        cell.run_dir.mkdir(parents=True)
        (cell.run_dir / "result.json").write_text(json.dumps({"status": "done", "step": 12, "val/loss": 200.0 - i}))
    board.closing(Console(), some, outcomes)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:2] == ["x=149", "failed"]
    assert lines[3].split()[:3] == ["x=148", "done", "52.0000"]
    assert lines[-1].startswith("and 50 more")


def test_labels_are_short_unless_two_keys_would_look_the_same() -> None:
    assert label(["optimizer.lr=0.001", "+x.seed=1"]) == "lr=0.001 seed=1"
    assert label(["model.hidden=8", "x.hidden=9"]) == "model.hidden=8 x.hidden=9"


# --- what is wrong ---


@pytest.fixture
def hydra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Hydra's loader, as a sweeper has it."""
    monkeypatch.chdir(tmp_path)
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3", job_name="gpt"):
        main = GlobalHydra.instance().hydra
        assert main
        yield main.config_loader


def master(loader: Any, *overrides: str) -> Any:
    return loader.load_configuration("config", list(overrides), RunMode.MULTIRUN)


CASES = [
    ["seed=2"],
    ["model=124m", "parallel=dp2", "optimizer.lr=1e-3", "trainer.global_batch_size=16"],
    ["debug=fast", "model.hidden=64", "model.ffn=100"],
    ["tags=[a,b]", "notes=x", "schedule.min_lr=0", "parallel=auto", "data=text", "data.path=."],
]


@pytest.mark.parametrize("overrides", CASES)
def test_a_cell_is_composed_as_hydra_composes_it(overrides: list[str], hydra: Any) -> None:
    """And its run is that of the single command."""
    grid = master(hydra)
    composer = composing.Composer(hydra, grid)
    composer.compose(["seed=7", *[o for o in overrides if "=" in o and "." not in o and "seed" not in o]])  # kept
    composed, choices = composer.compose(overrides)
    whole = hydra.load_sweep_config(grid, overrides)
    assert cli.checked(composed, choices, overrides) == config.typed(
        config.plain(cli.checked(cli.job_config(whole), whole.hydra.runtime.choices, overrides))
    )
    assert cli.name_of_run(composed, choices, overrides, Path("outputs")) == str(whole.hydra.sweep.subdir)


def test_all_problems_of_all_cells_are_told_at_once(hydra: Any) -> None:
    lists = [[f"seed={seed}", f"model.heads={heads}"] for seed in ("1", "x") for heads in (3, 4)]
    with pytest.raises(UserError) as refused:
        composing.compose(hydra, master(hydra), lists)
    said = refused.value.problems
    assert said[0].startswith("seed=1 heads=3: model.hidden=128 is not divisible by model.heads=3")
    assert said[1].startswith("seed=x: Value 'x' of type 'str' could not be converted to Integer (in 2 of 4 cells")
    assert os.listdir() == []


def before(loader: Any, *arguments: str, of_hydra: tuple[str, ...] = ()) -> list[str]:
    """What is wrong with ``-m arguments``."""
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(arguments))
    grid = OmegaConf.create({"task": "pretrain", "yes": False, "grid": {"confirm_above": 100}})
    for override in parsed:
        if not override.is_sweep_override():
            OmegaConf.update(grid, override.key_or_group, override.value())
    OmegaConf.update(grid, "hydra.overrides.hydra", list(of_hydra))
    try:
        checks.before(parsed, grid, Console())
    except UserError as error:
        return error.problems
    return []


def test_a_command_is_looked_at_before_a_cell_is_composed(hydra: Any) -> None:
    assert before(hydra, "seed=1,2") == []
    assert "model=glob(nothing*): nothing has such a name" in before(hydra, "model=glob(nothing*)")[0]
    (many,) = before(hydra, "seed=range(100000)", "optimizer.lr=1e-3,2e-3")
    assert many == "200,000 cells are more than grid.confirm_above=100: if you mean it, add yes=true"
    assert before(hydra, "seed=range(101)", "yes=true") == []
    assert before(hydra, "seed=range(101)", "grid.confirm_above=101") == []
    assert before(hydra, "task=plan", "seed=range(101)") == []
    assert "grid.slots is of the whole grid" in before(hydra, "grid.slots=1,2")[0]
    assert (
        "each cell of a grid has the folder of its run" in before(hydra, "seed=1,2", of_hydra=("hydra.run.dir=x",))[0]
    )


def test_in_a_terminal_a_large_grid_is_asked_about(hydra: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for answer, wrong in (("y\n", []), ("\n", ["nothing was started"])):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        monkeypatch.setattr(sys, "stdout", Terminal())
        assert before(hydra, "seed=range(101)") == wrong


def test_cells_that_cannot_be_one_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def together(*some: Cell, outputs: Path = tmp_path / "new" / "outputs") -> list[str]:
        with pytest.raises(UserError) as refused:
            checks.together(list(some), outputs)
        return refused.value.problems

    (one,) = cells(1)
    checks.together([one], tmp_path / "new")
    assert os.listdir(tmp_path) == []
    (serving,) = cells(1, more=("task=serve",))
    (typing,) = cells(1, more=("task=generate", "generate.interactive=true"))
    (gpu,) = cells(1, more=("cluster.device=gpu",))
    told = together(one, serving, typing, gpu)
    assert [problem.split(":")[0] for problem in told] == [
        "cells on cpu and gpu",
        "task=serve has no end, so it cannot be a cell of a grid",
        "generate.interactive=true needs your terminal",
    ]
    (tmp_path / "file").write_text("")
    assert f"cannot be written ({tmp_path}/file is not a folder)" in together(one, outputs=tmp_path / "file" / "x")[0]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert f"cannot be written (no permission to write in {tmp_path})" in together(one)[0]


def test_a_cell_that_needs_more_slots_than_there_are_would_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "cores", lambda: 2)
    big = cells(1, 2, more=("parallel=dp8", "trainer.global_batch_size=32"))
    with pytest.raises(UserError) as refused:
        checks.slots(big, 4)
    assert refused.value.problems == [
        "seed=1 and 1 more: a cell of 8 ranks takes 8 slots, and there are 4 (cores): "
        "choose a smaller parallel=..., or let ranks share cores with grid.slots=8"
    ]
    checks.slots(big, 8)


def test_cells_that_are_the_same_run_once_with_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    one, two = cells(1, 2)
    again = Cell([*one.overrides, "trainer.log_every=9"], one.config, one.run_dir, ["log_every=9"])
    assert launching._once([one, two, again, one], Console()) == [one, two]
    assert "3 cells are one run, run_1, which runs once" in capsys.readouterr().out


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
    """Twelve cells of one and two ranks, of which one fails until the reason is gone."""
    command = ["-m", *SMALL, "data=text", f"data.path={text}", "trainer.max_steps=24", "trainer.eval_every=0"]
    command += ["grid.slots=4", "grid.name=g", "parallel=single,dp2", "seed=1,2,3,4,5,6"]
    env = {"TMPDIR": str(tmp_path)}  # slots of its own
    folder, outputs = Folder(tmp_path / "outputs" / "grids" / "g"), tmp_path / "outputs"

    def driver() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "gpt.main", *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def records() -> int:
        return sum(len(runs.read_metrics(run)) for run in outputs.glob("tiny_*"))

    killed = driver()
    wait_until(lambda: records() > 8)
    killed.kill()  # its cells save and end
    killed.wait()
    stopped, before = driver(), records()  # at once: it takes over what those let go of
    wait_until(lambda: sum(e["event"] == "ended" for e in folder.events()) >= 3 and records() > before)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(120) == 143
    assert not any(runs.held(run) for run in outputs.glob("tiny_*"))
    twelve = folder.read()["cells"]
    assert len(twelve) == 12

    bad = next(outputs / name for name in twelve if not (outputs / name).exists())
    bad.mkdir()
    (bad / "logs").write_text("a file where a folder must be")
    third = gpt(*command, env=env, timeout=300)
    assert third.code == 1, third.text
    assert "1 of 12 cells are not done; the same command tries them again" in third.err
    assert "FAILED: " in third.out
    assert "File exists" in third.out
    (bad / "logs").unlink()
    grown = gpt(*command[:-1], "seed=1,2,3,4,5,6,7", env=env, timeout=300)
    assert grown.code == 0, grown.text
    assert "14: 2 new, 11 done before, 1 failed before, again" in grown.out
    assert len(folder.read()["cells"]) == 14

    for name in folder.read()["cells"]:
        assert [record["step"] for record in metrics(outputs / name)] == list(range(1, 25)), name
        assert json.loads((outputs / name / "result.json").read_text())["status"] == "done"
        events = [(event["event"], event.get("code")) for event in folder.events() if event["cell"] == name]
        assert ("ended", 0) not in events[:-1], events  # nothing was started after it was done
