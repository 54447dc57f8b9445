"""From Hydra's lists of overrides to a finished grid and its report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from gpt import planning, rules_cluster, wandb_run
from gpt.config import UserError
from gpt.config_cluster import ClusterKind
from gpt.console import Console
from gpt.grid import away, checks, composing, report, running
from gpt.grid.board import Outcome
from gpt.grid.cells import Cell
from gpt.grid.folder import Folder, name_of
from gpt.guard import FAILED
from gpt.launching import JobFailed
from gpt.runs import LAUNCH_ONLY


def launch(
    loader: Any,
    master: DictConfig,
    all_overrides: Sequence[Sequence[str]],
    *,
    first: bool = True,
) -> list[JobReturn]:
    """Run a grid, or a batch of cells that a sweeper asks for.

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
    if composing.is_plan(master):
        planning.show_grid(composing.plans(loader, master, all_overrides), console)
        return []
    outputs = Path(str(master.hydra.sweep.dir))
    composed = composing.compose(loader, master, all_overrides)
    cells = _once(composed, console)
    checks.together(cells, outputs)
    elsewhere = rules_cluster.is_away(cells[0].config)
    if not elsewhere:
        away.prepared(cells, console)
    arguments = list(master.hydra.overrides.task)
    folder = Folder(outputs / "grids" / (master.grid.name or name(arguments)))
    for cell in cells:
        labelled(cell, folder)
    command = ["python", "-m", "gpt.main", *sys.argv[1:]]
    # Composed, checked: from here on it matters where the cells run.
    try:
        if elsewhere:
            _results_are_there(cells[0], master)
            outcomes = away.grid(cells, folder, command, console)
        else:
            outcomes = running.run(cells, folder, command, console, first=first)
    finally:
        if not elsewhere or cells[0].config.cluster.wait:
            close(folder, console, show=first)
    return [_returned(cell, outcomes[cell.name]) for cell in composed]


def close(folder: Folder, console: Console, *, show: bool = True) -> None:
    """What a grid leaves, however it ended: its report, and what sends it to W&B."""
    report.after(folder.path, console, show=show)
    if later := wandb_run.commands(folder.path / "wandb"):
        console.next_commands(later)


def labelled(cell: Cell, folder: Folder) -> None:
    """What W&B calls a cell, and the grid that it is of."""
    wandb = cell.config.logger.wandb
    wandb.group = wandb.group or folder.path.name
    wandb.name = wandb.name or (cell.label if cell.differs else None)
    wandb.links = wandb.links or str((folder.path / "wandb").resolve())


def conclude(returns: Sequence[JobReturn]) -> None:
    """End a grid.

    Raises:
        JobFailed: of so many cells, so many failed.
    """
    cells = {str(each.working_dir) + "".join(each.overrides or ()): each for each in returns}
    failed = [each for each in cells.values() if each.status is JobStatus.FAILED]
    if failed:
        raise JobFailed(f"{len(failed)} of {len(cells)} cells are not done; the same command tries them again", FAILED)


def _once(cells: list[Cell], console: Console) -> list[Cell]:
    """The cells without those that are the same as an earlier one."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.name, []).append(cell)
    for same in found.values():
        if len(same) > 1:
            names = " and ".join(dict.fromkeys(cell.label for cell in same[:5]))
            why = "" if len({tuple(cell.overrides) for cell in same}) == 1 else ": they would compute the same"
            console.warn(f"{len(same)} cells are one run, {same[0].name}, which runs once{why} ({names})")
    return [same[0] for same in found.values()]


def _results_are_there(cell: Cell, master: DictConfig) -> None:
    """A sweeper that chooses by results must get them."""
    chooses = not str(master.hydra.sweeper._target_).endswith("GridSweeper")
    if chooses and not (cell.config.cluster.wait and cell.config.cluster.kind is ClusterKind.slurm):
        raise UserError.of(
            ["this search chooses by results, so it has to wait for them: cluster=slurm cluster.wait=true"]
        )


def name(arguments: list[str]) -> str:
    """The default name of a grid: by its swept keys, and by what is fixed and changes what is computed."""
    parsed = OverridesParser.create().parse_overrides(arguments)
    swept = [str(each.key_or_group) for each in parsed if each.is_sweep_override()]
    fixed = [each for each in parsed if not each.is_sweep_override() and not _only_how(each.key_or_group)]
    return name_of(swept, [each.input_line or "" for each in fixed])


def _only_how(key: str) -> bool:
    """Whether a key says how cells run or are shown, and not what they compute; the task is said as well."""
    return key != "task" and any(key == known or key.startswith(f"{known}.") for known in LAUNCH_ONLY)


def _returned(cell: Cell, outcome: Outcome) -> JobReturn:
    """What a sweeper is told: the validation loss, also of a pruned cell; None if the cell runs elsewhere."""
    returned = JobReturn(overrides=cell.overrides, working_dir=str(cell.run_dir))
    if outcome.bad:
        returned.status = JobStatus.FAILED
        returned.return_value = JobFailed(f"{cell.label}: {outcome.state} ({cell.name})", outcome.code or FAILED)
    else:
        returned.status = JobStatus.COMPLETED
        returned.return_value = cell.value()
    return returned
