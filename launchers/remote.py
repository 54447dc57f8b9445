"""Submit commands to Slurm, or show the commands to start on other machines."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from gpt.config.cluster import ClusterKind
from gpt.config.schema import Config
from gpt.data.corpus import DatasetInfo
from gpt.runs import run_dir as runs
from gpt.runs.grid import Cell, Folder
from gpt.tasks import pretrain
from gpt.utils.console import Console
from gpt.utils.errors import JobFailed
from gpt.utils.signals import FAILED
from launchers import nodes
from launchers.sweep import display, slurm_runner
from launchers.sweep.display import CellOutcome


def grid(cells: Sequence[Cell], folder: Folder, command: list[str], console: Console) -> dict[str, CellOutcome]:
    """Submit or show all cells of a grid; return the outcome of each, as far as it is known.

    Raises:
        UserError: nothing was submitted.
    """
    if _shown(cells, folder, console, array=True):
        return {cell.name: CellOutcome("shown") for cell in cells}
    datasets = prepared(cells, console)

    def wanted(cell: Cell) -> bool:
        return not cell.trains or _makes_sense(cell, datasets[_data(cell)], console)

    began = time.monotonic()
    outcomes = slurm_runner.run(cells, folder, command, console, wanted=wanted)
    if cells[0].config.cluster.wait:
        display.closing(console, list(cells), outcomes, time.monotonic() - began)
    return outcomes


def single(config: Config, run_dir: Path, overrides: list[str]) -> None:
    """Submit or show a command without ``-m``.

    Raises:
        UserError: nothing was submitted.
        JobFailed: it was waited for, and ended with another code than 0.
    """
    console = Console()
    cell, folder = Cell(overrides, config, run_dir), Folder(run_dir / "slurm")
    if _shown([cell], folder, console, array=False):
        return
    data = pretrain.prepare_data(config, console) if cell.trains else None

    def wanted(cell: Cell) -> bool:
        return data is None or _makes_sense(cell, data, console)

    command = ["python", "-m", "gpt.main", *overrides]
    outcome = slurm_runner.run([cell], folder, command, console, wanted=wanted, array=False)[cell.name]
    if outcome.code:
        raise JobFailed("", outcome.code if outcome.code > 0 else FAILED)


def _shown(cells: Sequence[Cell], folder: Folder, console: Console, *, array: bool) -> bool:
    """Show scripts or commands that are not submitted from here; return False if the cells are to be submitted."""
    config = cells[0].config
    cluster = config.cluster
    if cluster.kind is ClusterKind.slurm and not config.dry_run:
        return False
    if cluster.kind is ClusterKind.slurm:
        for _, _, script in slurm_runner.scripts(cells, folder, array=array):
            console.show(script)
    else:
        by_cell = [nodes.commands(cell.config, cell.overrides, Path.cwd()) for cell in cells]
        console.note("# To be started by you, at the same time, in this folder, which all hosts share:")
        for number, host in enumerate(cluster.hosts):
            console.note(f"# {host}")
            for commands in by_cell:
                console.note(commands[number][1])
    return True


def prepared(cells: Sequence[Cell], console: Console) -> dict[str, DatasetInfo]:
    """Prepare each data set of the cells that train once, before many cells would; return them by configuration.

    Raises:
        UserError: the data cannot be used by a cell.
    """
    different = {_data(cell): cell.config for cell in cells if cell.trains}
    return {data: pretrain.prepare_data(config, console) for data, config in different.items()}


def _data(cell: Cell) -> str:
    return f"{cell.config.data} {cell.config.checkpoint}"


def _makes_sense(cell: Cell, data: DatasetInfo, console: Console) -> bool:
    """Return whether the run has steps left; move its folder aside if it is to start afresh.

    Raises:
        UserError: the folder's run was trained on other data.
    """
    decision = runs.resume_decision(cell.run_dir, cell.config, data)
    if decision.aside:
        os.rename(cell.run_dir, decision.aside)
    for message in decision.messages:
        console.note(message)
    return decision.start
