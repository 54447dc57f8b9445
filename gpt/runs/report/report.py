"""``task=report``, and the end of every grid: the table in the terminal, ``summary.csv`` and ``.json``, the page."""

from __future__ import annotations

import os
from pathlib import Path

from gpt.config.schema import Config
from gpt.runs.report import collect, page, summary
from gpt.runs.report.summary import Summary
from gpt.utils.console import Console
from gpt.utils.errors import UserError

FILES = ("report.html", "summary.csv", "summary.json")
DEFAULT = Path("outputs")  # where runs are unless a command says otherwise
SHOWN_ROWS, SHOWN_GROUPS = 20, 10


def check(config: Config) -> list[str]:
    """What is wrong with the command, each a sentence; nothing is written."""
    folder, home = _places(config)
    problems = []
    if not folder.is_dir():
        problems.append(f"report.path={folder}: no such folder; a grid's is outputs/grids/NAME")
    elif not collect.has_runs(folder):
        problems.append(f"report.path={folder}: no run in it or below (no job.json), and no grid (grid.json)")
    if home != folder or folder.is_dir():
        parent = next(path for path in (home, *home.absolute().parents) if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            problems.append(f"report.output={home}: {parent} is not a folder that can be written to; choose another")
    return problems


def run(config: Config, console: Console) -> None:
    """Read the runs of a folder, write the page and the tables, and show what came out.

    Raises:
        UserError: they cannot be written.
    """
    folder, home = _places(config)
    try:
        show(write(folder, home), home, console)
    except OSError as error:
        raise UserError.of([f"report.output={home}: {error}; choose another"]) from error


def after(folder: Path, console: Console, *, show: bool = True) -> None:
    """At the end of a grid, however it ended; a page that cannot be made does not change that.

    Args:
        folder: of the grid.
        console: to print on.
        show: print what came out; the table of all cells is there already.
    """
    if not (folder / "grid.json").is_file():
        return
    try:
        results = write(folder, folder)
        if show:
            sum_up(results, folder, console)
    except Exception as error:
        console.warn(f"no report ({type(error).__name__}: {error}); task=report report.path={folder} makes it")


def write(folder: Path, home: Path) -> Summary:
    """Write the tables and the page about ``folder`` into ``home``, which is made if it is not there."""
    results = summary.summarise(collect.find(folder))
    home.mkdir(parents=True, exist_ok=True)
    summary.write(results, home)
    page.write(results, home, folder.resolve().name)
    return results


def show(results: Summary, home: Path, console: Console) -> None:
    """Print the best runs and ``sum_up``."""
    figures = [name for name in summary.figures_of(results) if name not in ("step", "flops")]
    header = ("state", *results.keys, *figures)
    rows = [
        (
            row.run.state,
            *(summary.brief(row.keys[key]) for key in results.keys),
            *(summary.shown(name, row.figures[name]) for name in figures),
        )
        for row in results.rows
    ]
    console.columns(f"{len(rows)} runs, the lowest {results.metric} first", header, rows[:SHOWN_ROWS])
    if len(rows) > SHOWN_ROWS:
        console.note(f"and {len(rows) - SHOWN_ROWS} more in {home / 'summary.csv'}")
    sum_up(results, home, console)


def sum_up(results: Summary, home: Path, console: Console) -> None:
    """Print the groups over seeds, what can be believed, where the files are, and what to do next."""
    groups = [group for group in results.groups if group.n]
    if results.spread and groups:
        keys = [key for key in results.keys if key != "seed"]
        console.columns(
            "over seeds",
            (*keys, "seeds", f"mean {results.metric}", "sd", "verdict"),
            [
                (
                    *(summary.brief(results.rows[group.runs[0]].keys[key]) for key in keys),
                    str(group.n),
                    f"{group.mean:.4f}",
                    "" if group.sd is None else f"{group.sd:.4f}",
                    page.VERDICTS[group.verdict],
                )
                for group in groups[:SHOWN_GROUPS]
            ],
        )
    for line in summary.verdict(results):
        console.note(line)
    console.note(f"written: {home / FILES[0]}, {FILES[1]}, {FILES[2]}")
    best = None if results.best is None else results.rows[results.best].run
    if best and best.state == "done" and (line := summary.command(best)):
        console.next_commands([(line, "the best of the best configuration; trainer.resume=never starts it afresh")])


def _places(config: Config) -> tuple[Path, Path]:
    """What is read, and where the files go."""
    folder = Path(config.report.path) if config.report.path else DEFAULT
    return folder, Path(config.report.output) if config.report.output else folder
