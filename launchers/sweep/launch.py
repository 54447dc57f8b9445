"""Run a grid from Hydra's lists of overrides to its report."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from gpt.config import cluster_rules
from gpt.config.cluster import ClusterKind
from gpt.config.derived import replace_in
from gpt.runs import wandb_run
from gpt.runs.grid import Cell, Folder, name_of
from gpt.runs.report import report
from gpt.runs.run_dir import NON_IDENTITY_KEYS
from gpt.tasks import plan
from gpt.utils.console import Console
from gpt.utils.errors import JobFailed, UserError
from gpt.utils.signals import FAILED
from launchers import remote
from launchers.sweep import checks, compose, local_runner
from launchers.sweep.display import CellOutcome


def launch(
    loader: Any,
    master: DictConfig,
    all_overrides: Sequence[Sequence[str]],
    *,
    first: bool = True,
) -> list[JobReturn]:
    """Run a grid, or a batch of cells of a sweeper.

    Args:
        loader: Hydra's config loader.
        master: the configuration of the whole grid.
        all_overrides: of every cell.
        first: whether it is the first batch.

    Raises:
        UserError: a cell cannot be; nothing was started.
        JobFailed: the grid was stopped.
    """
    console = Console()
    if compose.is_plan(master):
        plan.show_grid(compose.plans(loader, master, all_overrides), console)
        return []
    outputs = Path(str(master.hydra.sweep.dir))
    composed = compose.compose(loader, master, all_overrides)
    cells = _deduplicate(composed, console)
    checks.together(cells, outputs)
    elsewhere = cluster_rules.is_away(cells[0].config)
    if not elsewhere:
        remote.prepared(cells, console)
    arguments = list(master.hydra.overrides.task)
    folder = Folder(outputs / "grids" / (master.grid.name or name(arguments)))
    cells = [label_for_wandb(cell, folder) for cell in cells]
    command = ["python", "-m", "gpt.main", *sys.argv[1:]]
    # Composed, checked: from here on it matters where the cells run.
    try:
        if elsewhere:
            _results_are_there(cells[0], master)
            outcomes = remote.grid(cells, folder, command, console)
        else:
            outcomes = local_runner.run(cells, folder, command, console, first=first)
    finally:
        if not elsewhere or cells[0].config.cluster.wait:
            close(folder, console, show=first)
    return [_returned(cell, outcomes[cell.name]) for cell in composed]


def close(folder: Folder, console: Console, *, show: bool = True) -> None:
    """Write a grid's report and show the commands that send it to W&B, however it ended."""
    report.after(folder.path, console, show=show)
    if later := wandb_run.commands(folder.path / "wandb"):
        console.next_commands(later)


def label_for_wandb(cell: Cell, folder: Folder) -> Cell:
    """Return the cell with its name and its grid's name in W&B."""
    wandb = cell.config.logger.wandb
    values = {
        "logger.wandb.group": wandb.group or folder.path.name,
        "logger.wandb.name": wandb.name or (cell.label if cell.differs else None),
        "logger.wandb.links": wandb.links or str((folder.path / "wandb").resolve()),
    }
    return dataclasses.replace(cell, config=replace_in(cell.config, values))


def raise_for_failures(returns: Sequence[JobReturn]) -> None:
    """Raise if cells of a grid have failed.

    Raises:
        JobFailed: of so many cells, so many failed.
    """
    cells = {str(each.working_dir) + "".join(each.overrides or ()): each for each in returns}
    failed = [each for each in cells.values() if each.status is JobStatus.FAILED]
    if failed:
        raise JobFailed(f"{len(failed)} of {len(cells)} cells are not done; the same command tries them again", FAILED)


def _deduplicate(cells: list[Cell], console: Console) -> list[Cell]:
    """Return the cells without those equal to an earlier one."""
    cells_by_name: dict[str, list[Cell]] = {}
    for cell in cells:
        cells_by_name.setdefault(cell.name, []).append(cell)
    for same in cells_by_name.values():
        if len(same) > 1:
            names = " and ".join(dict.fromkeys(cell.label for cell in same[:5]))
            why = "" if len({tuple(cell.overrides) for cell in same}) == 1 else ": they would compute the same"
            console.warn(f"{len(same)} cells are one run, {same[0].name}, which runs once{why} ({names})")
    return [same[0] for same in cells_by_name.values()]


def _results_are_there(cell: Cell, master: DictConfig) -> None:
    """Raise if a sweeper that chooses by results would not get them."""
    chooses = not str(master.hydra.sweeper._target_).endswith("GridSweeper")
    if chooses and not (cell.config.cluster.wait and cell.config.cluster.kind is ClusterKind.slurm):
        raise UserError.of(
            ["this search chooses by results, so it has to wait for them: cluster=slurm cluster.wait=true"]
        )


def name(arguments: list[str]) -> str:
    """Return the default name of a grid: its swept keys, and a hash of fixed overrides that change the computation."""
    parsed = OverridesParser.create().parse_overrides(arguments)
    swept = [str(each.key_or_group) for each in parsed if each.is_sweep_override()]
    fixed = [each for each in parsed if not each.is_sweep_override() and not _only_how(each.key_or_group)]
    return name_of(swept, [each.input_line or "" for each in fixed])


def _only_how(key: str) -> bool:
    """Return whether a key sets only how cells run or are shown; the task is not such a key."""
    return key != "task" and any(key == known or key.startswith(f"{known}.") for known in NON_IDENTITY_KEYS)


def _returned(cell: Cell, outcome: CellOutcome) -> JobReturn:
    """Return a sweeper's result: the validation loss, also of a pruned cell; None if the cell runs elsewhere."""
    returned = JobReturn(overrides=cell.overrides, working_dir=str(cell.run_dir))
    if outcome.bad:
        returned.status = JobStatus.FAILED
        returned.return_value = JobFailed(f"{cell.label}: {outcome.state} ({cell.name})", outcome.code or FAILED)
    else:
        returned.status = JobStatus.COMPLETED
        returned.return_value = cell.value()
    return returned
