"""The cells of a grid, from Hydra's lists of overrides: all are composed and checked before the first starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from omegaconf import DictConfig

from gpt import cli, driver, planning, trained
from gpt.config import Config, UserError
from gpt.grid.cells import Cell

Composed = tuple[list[str], Config | list[str]]  # the overrides, and the configuration or its problems


def compose(loader: Any, master: DictConfig, all_overrides: Sequence[Sequence[str]]) -> list[Cell]:
    """The cells of a grid.

    Args:
        loader: Hydra's config loader.
        master: the configuration of the whole grid.
        all_overrides: of every cell.

    Raises:
        UserError: listing the problems of all cells.
    """
    setup_globals()
    everywhere = set.intersection(*(set(overrides) for overrides in all_overrides))
    cells, problems = [], []
    for overrides in map(list, all_overrides):
        differs = [override for override in overrides if override not in everywhere]
        try:
            config, run_dir = _one(loader, master, overrides)
            cell = Cell(overrides, config, run_dir, differs)
            driver.gate(config, run_dir)
            cells.append(cell)
        except UserError as error:
            problems += [f"{' '.join(differs)}: {line[4:]}" for line in str(error).splitlines()[1:]] or [str(error)]
        except cli.CONFIG_ERRORS as error:
            problems.append(f"{' '.join(differs)}: {error}")
    if problems:
        raise UserError.of(problems)
    return cells


def _one(loader: Any, master: DictConfig, overrides: list[str]) -> tuple[Config, Path]:
    composed = loader.load_sweep_config(master, overrides)
    HydraConfig.instance().set_config(composed)
    config = cli.checked(cli.job_config(composed), composed.hydra.runtime.choices, overrides)
    if config.checkpoint and trained.reads_one(config.task):
        return config, trained.home(Path(config.checkpoint))
    return config, Path(str(composed.hydra.sweep.dir)) / str(composed.hydra.sweep.subdir)


def plans(loader: Any, master: DictConfig, all_overrides: Sequence[Sequence[str]]) -> list[Composed]:
    """The same for a grid of plans, which shows what is possible beside what is not."""
    setup_globals()
    found: list[Composed] = []
    for overrides in map(list, all_overrides):
        try:
            composed = loader.load_sweep_config(master, overrides)
            HydraConfig.instance().set_config(composed)
            config, problems = cli.examined(cli.job_config(composed), composed.hydra.runtime.choices, overrides)
            found.append((overrides, problems if problems or config is None else config))
        except cli.CONFIG_ERRORS as error:
            found.append((overrides, [str(error).splitlines()[0]]))
    return found


def is_plan(master: DictConfig) -> bool:
    """Whether the grid asks for plans."""
    return planning.is_plan(master)
