"""From Hydra's lists of overrides to a finished grid and its report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from gpt import driver, planning, wandb_run
from gpt.config import Task, plain
from gpt.console import Console
from gpt.grid import composing, running
from gpt.grid.cells import Cell
from gpt.grid.folder import Folder, name_of
from gpt.guard import FAILED
from gpt.launching import JobFailed


def launch(loader: Any, master: DictConfig, all_overrides: Sequence[Sequence[str]]) -> list[JobReturn]:
    """Run a grid, or a batch of cells that a sweeper asks for.

    Raises:
        UserError: a cell cannot be; nothing was started.
        JobFailed: a cell failed.
    """
    console = Console()
    if composing.is_plan(master):
        planning.show_grid(composing.plans(loader, master, all_overrides), console)
        return []
    cells = composing.compose(loader, master, all_overrides)
    if cells[0].config.task is Task.pretrain:  # once, before many do it at a time
        for config in {json.dumps(plain(cell.config)["data"]): cell.config for cell in cells}.values():
            driver.prepared(config, console)
    arguments = list(master.hydra.overrides.task)
    folder = Folder(Path(str(master.hydra.sweep.dir)) / "grids" / (cells[0].config.grid.name or _name(arguments)))
    for cell in cells:
        wandb = cell.config.logger.wandb
        wandb.group, wandb.name = wandb.group or folder.path.name, wandb.name or wandb_run.name_of(cell.differs)
        wandb.links = wandb.links or str((folder.path / "wandb").resolve())
    codes = running.run(cells, folder, ["python", "-m", "gpt.main", "-m", *arguments], console)
    if later := wandb_run.commands(folder.path / "wandb"):
        console.next_commands(later)
    if failed := [cell for cell in cells if codes.get(cell.name)]:
        raise JobFailed(f"{len(failed)} of {len(cells)} cells failed; the same command tries them again", FAILED)
    return [_returned(cell, codes) for cell in cells]


def _name(arguments: list[str]) -> str:
    parsed = OverridesParser.create().parse_overrides(arguments)
    swept = [str(each.key_or_group) for each in parsed if each.is_sweep_override()]
    return name_of(swept, [each.input_line or "" for each in parsed if not each.is_sweep_override()])


def _returned(cell: Cell, codes: dict[str, int]) -> JobReturn:
    returned = JobReturn(overrides=cell.overrides, working_dir=str(cell.run_dir))
    returned.status = JobStatus.COMPLETED
    returned.return_value = running.value(cell)
    return returned
