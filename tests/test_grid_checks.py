"""A grid as it is read and shown: composed as Hydra does it, all that is wrong said before anything is started."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Ran
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf
from played import cells

from gpt import cli
from gpt.config import derived
from gpt.runs.grid import Cell, label
from gpt.utils import machine
from gpt.utils.console import Console
from gpt.utils.errors import UserError
from launchers.sweep import checks, compose, display, launch
from launchers.sweep.display import CellOutcome, Line

Run = Callable[..., Ran]

# --- what is shown ---


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_table_fits_the_terminal_also_with_many_cells(width: int) -> None:
    from rich.console import Console as Rich

    record = {"step": 4, "train/loss": 5.25, "tokens_per_second": 1234.0}
    lines = [Line(cell, record, 75.0) for cell in cells(*range(200), more=("model.dropout=0.15",))]
    foot = display.tally([CellOutcome("running")] * 200 + [CellOutcome("done before")])
    rich = Rich(width=width, height=24, record=True, file=io.StringIO())
    rich.print(display.table(lines, foot, 24))
    shown = rich.export_text().splitlines()
    assert len(shown) <= 24
    assert all(len(line) <= width for line in shown)
    assert shown[1].split() == ["seed=0", "4/12", "5.250", "1,234", "1:15", "0:02"]  # 8 steps of 8 x 32 tokens
    assert shown[-2].startswith("and 181 more")
    assert shown[-1].rstrip() == "201 cells: 1 done, 200 running"


def test_at_the_end_what_is_not_done_is_listed_and_the_rest_counted(capsys: pytest.CaptureFixture[str]) -> None:
    some = [Cell([], cell.config, Path("outputs", f"run_{i}"), [f"x={i}"]) for i, cell in enumerate(cells(1) * 300)]
    outcomes = {cell.name: CellOutcome("done" if i < 150 else "not started") for i, cell in enumerate(some)}
    outcomes["run_150"] = CellOutcome("failed", code=3, seconds=75.0)
    outcomes["run_299"] = CellOutcome("elsewhere")
    display.closing(Console(), some, outcomes, 3675.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["x=150", "failed", "3", "1:15", "run_150"]
    assert lines[-3:] == [
        "and 50 more",
        "still running elsewhere: x=299",
        "300 cells: 150 done, 1 failed, 148 not started, 1 elsewhere | 1:01:15",
    ]


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
    composer = compose.Composer(hydra, grid)
    composer.compose(["seed=7", *[o for o in overrides if "=" in o and "." not in o and "seed" not in o]])  # kept
    composed, choices = composer.compose(overrides)
    whole = hydra.load_sweep_config(grid, overrides)
    cell = cli.resolve(composed, choices, overrides)
    single = cli.resolve(cli.job_config(whole), whole.hydra.runtime.choices, overrides)
    assert cell.config == derived.typed(derived.plain(single.config))
    assert cell.name == single.name == str(whole.hydra.sweep.subdir)


def test_all_problems_of_all_cells_are_told_at_once(hydra: Any) -> None:
    lists = [[f"seed={seed}", f"model.heads={heads}"] for seed in ("1", "x") for heads in (3, 4)]
    with pytest.raises(UserError) as refused:
        compose.compose(hydra, master(hydra), lists)
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
        "task=serve does not go with a grid (-m)",
        "generate.interactive=true does not go with a grid (-m), which has no terminal",
    ]
    (tmp_path / "file").write_text("")
    assert f"cannot be written ({tmp_path}/file is not a folder)" in together(one, outputs=tmp_path / "file" / "x")[0]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert f"cannot be written (no permission to write in {tmp_path})" in together(one)[0]


def test_a_cell_that_needs_more_slots_than_there_are_would_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 2)
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
    assert launch._deduplicate([one, two, again, one], Console()) == [one, two]
    assert "3 cells are one run, run_1, which runs once" in capsys.readouterr().out
