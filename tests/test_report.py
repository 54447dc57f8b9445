"""The report about many runs: what is gathered, what differs, what is luck, and a page that anybody can open."""

from __future__ import annotations

import csv
import json
import math
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import composed, configured
from run_folders import BASE, curve, grid_of, run_folder

from gpt.config.rules import check
from gpt.runs import run_dir
from gpt.runs.report import collect, page, report, statistics, summary
from gpt.runs.report.statistics import Group
from gpt.utils.console import Console
from gpt.utils.errors import UserError
from launchers import driver


def states(folder: Path) -> dict[str, str]:
    return {run.name: run.state for run in collect.find(folder).runs}


# ---- what is gathered ----


def test_every_end_of_a_run_is_told_apart(tmp_path: Path) -> None:
    run_folder(tmp_path / "a", {}, curve(3.0))
    run_folder(tmp_path / "deep" / "b", {}, curve(3.0)[:20], result=None)
    run_folder(tmp_path / "c", {}, curve(3.0)[:20], result={"status": "guard", "step": 20})
    run_folder(tmp_path / "d", {}, curve(3.0)[:20], result={"status": "stopped", "step": 20})
    run_folder(tmp_path / "e", {}, curve(3.0), result={"status": "done", "step": 20})  # max_steps was raised since
    run_folder(tmp_path / "f", {}, [], result=None)
    lock = run_dir.lock_of(tmp_path / "f")
    assert lock.acquire()
    found = states(tmp_path)
    lock.release()
    ends = {"a": "done", "b": "interrupted", "c": "guard", "d": "stopped", "e": "interrupted", "f": "running"}
    assert found == ends


def test_what_a_search_gave_up_is_told_from_what_was_stopped(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run_folder(tmp_path / name, {}, curve(3.0)[:20], result={"status": "stopped", "step": 20})
    ends = [{"cell": "a", "event": "pruned", "code": 143}, {"cell": "b", "event": "ended", "code": -15}]
    ends.append({"cell": "d", "event": "submitted", "job": "7"})
    grid = grid_of(tmp_path, {name: [] for name in "abcd"}, ends)
    assert states(grid) == {"a": "pruned", "b": "stopped", "c": "new", "d": "submitted"}


def test_a_torn_line_and_steps_computed_again_do_not_spoil_a_curve(tmp_path: Path) -> None:
    again = '{"step": 40, "tokens": 81920, "train/loss": 9.0}\n{"step": 41, "tok'
    run_folder(tmp_path / "a", {}, curve(3.0), torn=again)
    (run,) = collect.find(tmp_path).runs
    assert run.columns["step"].tolist() == list(range(1, 51))
    assert run.columns["train/loss"][39] == 9.0
    assert run.columns["train/loss"][49] == 3.0


def test_a_run_of_another_version_without_half_of_the_keys_has_its_place(tmp_path: Path) -> None:
    run_folder(tmp_path / "new", {"optimizer.lr": 1e-3}, curve(3.0))
    old = tmp_path / "old"
    old.mkdir()
    shape = {key: BASE["model"][key] for key in run_dir.SHAPE_KEYS}
    config = {"seed": 1024, "model": shape, "data": {"seq_len": 128}, "optimizer": {"lr": 3e-3}, "gone": {"key": 1}}
    (old / "job.json").write_text(json.dumps({"config": config}))
    (old / "metrics.jsonl").write_text('{"step": 1, "tokens": 2048, "train/loss": 8.3, "val/loss": 8.2}\n')
    found = summary.summarise(collect.find(tmp_path))
    assert found.keys == ["optimizer.lr"]
    assert [row.run.name for row in found.rows] == ["new", "old"]
    assert found.rows[1].figures["parameters"] == found.rows[0].figures["parameters"]
    assert found.rows[1].figures["flops"] == pytest.approx(found.rows[0].figures["flops"] / 50)


def test_a_cell_that_failed_before_it_had_a_run_is_there_with_its_overrides_and_its_log(tmp_path: Path) -> None:
    run_folder(tmp_path / "good", {"optimizer.lr": 0.001}, curve(3.0))
    cells = {"good": ["optimizer.lr=0.001"], "bad": ["optimizer.lr=0.1"], "later": ["optimizer.lr=1"]}
    events = [{"cell": "bad", "event": "started"}, {"cell": "bad", "event": "ended", "code": 1}]
    grid = grid_of(tmp_path, cells, events)
    (grid / "cells" / "bad.log").write_text("\x1b[31mno space\x1b[0m left on device\n")
    assert states(grid) == {"good": "done", "bad": "failed", "later": "new"}
    found = summary.summarise(collect.find(grid))
    assert {row.run.name: row.keys["optimizer.lr"] for row in found.rows} == {"good": 0.001, "bad": 0.1, "later": 1}
    text = page.write(found, grid, "g").read_text()
    assert "<pre>no space left on device</pre>" in text
    assert 'href="cells/bad.log"' in text


def test_a_grid_is_read_from_the_folder_around_it_too_and_every_run_once(tmp_path: Path) -> None:
    run_folder(tmp_path / "good", {}, curve(3.0))
    run_folder(tmp_path / "other", {}, curve(3.0))
    grid_of(tmp_path, {"good": [], "bad": ["seed=2"]}, [{"cell": "bad", "event": "ended", "code": 3}])
    found = [(run.name, run.state) for run in collect.find(tmp_path).runs]
    assert sorted(found) == [("bad", "guard"), ("good", "done"), ("other", "done")]
    (tmp_path / "grids" / "g").rename(tmp_path / "grids" / "f")
    grid_of(tmp_path, {"good": []}, [])  # a run that two grids have
    assert sorted(run.name for run in collect.find(tmp_path).runs) == ["bad", "good", "other"]


def test_a_grid_of_another_task_is_a_table_of_what_its_cells_were_asked(tmp_path: Path) -> None:
    run_folder(tmp_path / "run", {}, curve(3.0))
    cells = {f"run_evaluate_{k}": ["task=evaluate", f"evaluate.stride={k}"] for k in (1, 2)}
    grid = grid_of(tmp_path, cells, [{"cell": "run_evaluate_1", "event": "ended", "code": 0}])
    for name in cells:
        frozen = {"run_dir": str(tmp_path / "run"), "config": {**BASE, "task": "evaluate"}}
        (grid / "cells" / f"{name}.json").write_text(json.dumps(frozen))
    found = report.write(grid, grid)
    assert [(row.run.state, row.keys) for row in found.rows] == [
        ("done", {"evaluate.stride": 1}),
        ("new", {"evaluate.stride": 2}),
    ]
    assert found.rows[0].figures["parameters"] is None  # those of the command, not of what it evaluated


def test_reading_changes_nothing(tmp_path: Path) -> None:
    run_folder(tmp_path / "a", {}, curve(3.0), torn='{"st')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    summary.summarise(collect.find(tmp_path))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# ---- the table ----


def test_only_keys_that_differ_and_do_not_follow_from_another_are_columns(tmp_path: Path) -> None:
    wide = {"model.hidden": 256, "model.ffn": 1024}
    run_folder(tmp_path / "a", {"notes": "x", "model.dropout": 0.1}, curve(3.0), overrides=[])
    run_folder(tmp_path / "b", wide, curve(3.1), overrides=["model.hidden=256"])
    run_folder(tmp_path / "c", {**wide, "model.ffn": 512}, curve(3.2), overrides=["model.hidden=256", "model.ffn=512"])
    keys = summary.summarise(collect.find(tmp_path)).keys
    assert keys == ["model.hidden", "model.ffn", "model.dropout"]  # notes change nothing
    shutil.rmtree(tmp_path / "c")
    assert summary.summarise(collect.find(tmp_path)).keys == ["model.hidden", "model.dropout"]


def test_the_table_has_the_lowest_loss_first_and_is_the_same_in_csv_and_json(tmp_path: Path) -> None:
    for name, lr, end in (("a", 0.1, 4.0), ("b", 0.01, 3.0), ("c", 0.001, 3.5)):
        run_folder(tmp_path / name, {"optimizer.lr": lr}, curve(end))
    run_folder(tmp_path / "d", {"optimizer.lr": 1.0}, [8.0], result={"status": "guard", "step": 1})
    (tmp_path / "d" / "metrics.jsonl").write_text('{"step": 1, "tokens": 2048, "train/loss": null}\n')
    (tmp_path / "d" / "result.json").write_text('{"status": "guard", "step": 1, "train/loss": null}')
    report.write(tmp_path, tmp_path / "out")
    table = list(csv.DictReader((tmp_path / "out" / "summary.csv").read_text().splitlines()))
    stored = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["name"] for row in table] == [run["name"] for run in stored["runs"]] == ["b", "c", "a", "d"]
    assert [row["optimizer.lr"] for row in table] == ["0.01", "0.001", "0.1", "1"]
    assert float(table[0]["val/loss"]) == stored["runs"][0]["val/loss"] == stored["best"]["val/loss"] == 3.1
    assert table[3]["val/loss"] == ""
    assert stored["runs"][3]["val/loss"] is None
    assert stored["runs"][0]["folder"] == "../b"
    assert stored["runs"][0]["seconds"] == 25.0


def test_the_best_command_composes_and_is_that_run(tmp_path: Path) -> None:
    run_folder(tmp_path / "a", {"optimizer.lr": 0.002}, curve(3.0), overrides=["optimizer.lr=0.002", "grid.name=g"])
    run_folder(tmp_path / "b", {"optimizer.lr": 0.02}, curve(4.0))
    report.write(tmp_path, tmp_path)
    words = shlex.split(json.loads((tmp_path / "summary.json").read_text())["best"]["command"])
    assert words[:3] == ["python", "-m", "gpt.main"]
    assert "grid.name=g" not in words
    config, choices = composed(words[3:])
    typed, problems = check(config, choices)
    assert problems == []
    assert typed
    assert typed.optimizer.lr == 0.002


def test_a_run_that_is_not_done_is_not_the_best_while_another_is(tmp_path: Path) -> None:
    run_folder(tmp_path / "a", {"seed": 1}, curve(3.0))
    run_folder(tmp_path / "b", {"seed": 2}, curve(2.0)[:30], result={"status": "failed", "step": 30})
    found = summary.summarise(collect.find(tmp_path))
    assert found.best is not None
    assert found.rows[found.best].run.name == "a"


def test_while_no_run_is_done_those_that_came_furthest_are_compared(tmp_path: Path) -> None:
    for name, seed, steps in (("a", 1, 20), ("b", 2, 30), ("c", 3, 30)):
        run_folder(tmp_path / name, {"seed": seed}, curve(3.0 + seed)[:steps], result=None)
    found = summary.summarise(collect.find(tmp_path))
    (group,) = found.groups
    assert sorted(group.seeds) == [2, 3]
    assert summary.verdict(found)[0] == "No run is done; those that came furthest are compared."


# ---- seeds ----


@pytest.mark.parametrize(  # Harter, 1960, as in any table of the studentized range at 5 %
    ("k", "freedom", "expected"), [(2, 10, 3.15), (3, 10, 3.88), (10, 20, 5.01), (5, 60, 3.98), (3, 2, 8.33)]
)
def test_the_studentized_range_is_that_of_the_tables(k: int, freedom: int, expected: float) -> None:
    assert statistics.studentized_range(k, freedom) == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.706), (4, 2.776), (10, 2.228), (30, 2.042)])
def test_with_two_groups_it_is_students_t(freedom: int, expected: float) -> None:
    assert statistics.studentized_range(2, freedom) / math.sqrt(2) == pytest.approx(expected, rel=1e-3)


def test_what_is_nearer_to_the_best_than_luck_reaches_could_be_as_good() -> None:
    groups = [Group([3, 4, 5], [3.5, 3.51, 3.52]), Group([0, 1, 2], [3.0, 3.01, 3.02])]
    groups.append(Group([6, 7, 8], [3.01, 3.02, 3.03]))
    spread = statistics.compare_seeds(groups)
    assert spread
    assert spread.freedom == 4  # of the better half, at least two
    assert spread.sd == pytest.approx(0.01)
    assert spread.difference == pytest.approx(statistics.studentized_range(3, 4) * 0.01 / math.sqrt(3))
    assert spread.pair == pytest.approx(2.776 * 0.01 * math.sqrt(2 / 3), rel=1e-3)
    assert [group.verdict for group in groups] == ["best", "same", "worse"]
    assert [group.runs[0] for group in groups] == [0, 6, 3]


def test_a_diverging_configuration_does_not_hide_what_others_show() -> None:
    groups = [Group([0], [3.0, 3.01]), Group([1], [3.3, 3.31]), Group([2], [5.0, 9.0]), Group([3], [3.0, 8.0])]
    spread = statistics.compare_seeds(groups)
    assert spread
    assert spread.sd < 0.02
    verdicts = {group.runs[0]: group.verdict for group in groups}
    assert verdicts == {0: "best", 1: "worse", 2: "same", 3: "same"}  # of such wide ones nothing can be said


def test_equal_configurations_are_called_different_as_rarely_as_promised() -> None:
    draws = np.random.default_rng(0).normal(3.0, 0.05, (400, 5, 3))
    wrong = 0
    for draw in draws:
        groups = [Group([i], values) for i, values in enumerate(draw.tolist())]
        statistics.compare_seeds(groups)
        wrong += any(group.verdict == "worse" for group in groups)
    assert wrong / 400 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_with_one_seed_it_says_that_nothing_can_be_said(tmp_path: Path) -> None:
    run_folder(tmp_path / "a", {"optimizer.lr": 0.1}, curve(3.0))
    run_folder(tmp_path / "b", {"optimizer.lr": 0.2}, curve(3.1))
    found = summary.summarise(collect.find(tmp_path))
    assert found.spread is None
    assert "seed=1,2,3" in summary.verdict(found)[0]


def test_the_same_seed_twice_counts_once_and_a_failed_one_not_at_all(tmp_path: Path) -> None:
    run_folder(tmp_path / "a", {"seed": 1}, curve(3.0))
    run_folder(tmp_path / "a.old-1", {"seed": 1}, curve(3.0))
    run_folder(tmp_path / "b", {"seed": 2}, curve(3.2))
    run_folder(tmp_path / "c", {"seed": 3}, curve(1.0)[:9], result={"status": "guard", "step": 9})
    (group,) = summary.summarise(collect.find(tmp_path)).groups
    assert sorted(group.seeds) == [1, 2]
    assert len(group.runs) == 4
    assert group.mean == pytest.approx(3.2)


# ---- the command ----


def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    run_folder(tmp_path / "a", {}, curve(3.0))
    for path, output, what in (
        ("none", None, "no such folder"),
        ("empty", None, "no run in it"),
        ("a", "file/x", "is not a folder"),
    ):
        more = [f"report.output={tmp_path / output}"] if output else []
        config = configured(["task=report", f"report.path={tmp_path / path}", *more])
        with pytest.raises(UserError, match=what):
            driver.preflight(config, tmp_path)
    assert not list(tmp_path.rglob("summary.*"))


def test_the_command_prints_the_table_and_says_where_the_page_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (1, 2, 3):
        run_folder(tmp_path / f"r{seed}", {"seed": seed}, curve(3.0 + seed / 100))
    home = tmp_path / "made" / "here"
    config = configured(["task=report", f"report.path={tmp_path}", f"report.output={home}"])
    driver.preflight(config, tmp_path)
    driver.run(config, tmp_path, [])
    out = capsys.readouterr().out
    assert "== 3 runs, the lowest val/loss first ==" in out
    assert str(home / "report.html") in out
    assert "python -m gpt.main model=tiny trainer.max_steps=50 seed=1" in out
    assert sorted(file.name for file in home.iterdir()) == sorted(report.FILES)


def test_a_page_that_cannot_be_made_does_not_change_how_a_grid_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = grid_of(tmp_path, {"bad": ["seed=2"]}, [])
    (grid / "report.html").mkdir()
    report.after(grid, Console())
    assert "no report" in capsys.readouterr().out
    report.after(tmp_path / "nowhere", Console())
    assert capsys.readouterr().out == ""
