"""Compose the cells of a grid from Hydra's lists of overrides: all are checked before the first starts.

Hydra takes a tenth of a second to compose a command. What it composes for the groups that a cell chooses is kept, and
plain values are set on a copy: a hundredth.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.utils import setup_globals
from omegaconf import DictConfig, OmegaConf

from gpt import cli
from gpt.config.schema import Config
from gpt.data import corpus
from gpt.runs.grid import Cell, label
from gpt.tasks import plan
from gpt.utils.errors import UserError
from launchers import driver

Composed = tuple[list[str], Config | list[str]]  # the overrides, and the configuration or its problems
SHOWN = 5  # cells of one problem


class Composer:
    """Composes the cells of one grid."""

    def __init__(self, loader: Any, master: DictConfig) -> None:
        setup_globals()
        self._loader, self._master = loader, master
        self._groups = set(master.hydra.runtime.choices)
        self._parser = OverridesParser.create()
        self._parsed: dict[str, Override] = {}
        self._bases: dict[tuple[str, ...], tuple[DictConfig, dict[str, Any]]] = {}

    def compose(self, overrides: Sequence[str]) -> tuple[DictConfig, dict[str, Any]]:
        """Return the configuration without Hydra's part, and the choices.

        Raises:
            cli.CONFIG_ERRORS: it cannot be composed.
        """
        parsed = [self._parse(override) for override in overrides]
        values = [override for override in parsed if self._is_value(override)]
        groups = [override for override in parsed if override.key_or_group in self._groups]
        if len(values) + len(groups) < len(parsed):
            return self._by_hydra(tuple(overrides), keep=False)
        base, choices = self._by_hydra(tuple(str(override.input_line) for override in groups), keep=True)
        composed = copy.deepcopy(base)
        try:
            for override in values:
                OmegaConf.update(composed, override.key_or_group, override.value(), merge=True)
        except cli.CONFIG_ERRORS:
            return self._by_hydra(tuple(overrides), keep=False)  # it has the better words for what is wrong
        return composed, choices

    def _parse(self, override: str) -> Override:
        if override not in self._parsed:
            self._parsed[override] = self._parser.parse_override(override)
        return self._parsed[override]

    def _is_value(self, override: Override) -> bool:
        key = override.key_or_group
        ours = key not in self._groups and not key.startswith("hydra") and "/" not in key
        return ours and override.type is OverrideType.CHANGE and override.package is None

    def _by_hydra(self, overrides: tuple[str, ...], *, keep: bool) -> tuple[DictConfig, dict[str, Any]]:
        if overrides in self._bases:
            return self._bases[overrides]
        whole = self._loader.load_sweep_config(self._master, list(overrides))
        HydraConfig.instance().set_config(whole)  # for interpolations that ask Hydra
        made = cli.job_config(whole), dict(whole.hydra.runtime.choices)
        if keep:
            self._bases[overrides] = made
        return made


def compose(loader: Any, master: DictConfig, all_overrides: Sequence[Sequence[str]]) -> list[Cell]:
    """Compose and check the cells of a grid.

    Raises:
        UserError: listing the problems of all cells.
    """
    composer, outputs = Composer(loader, master), Path(str(master.hydra.sweep.dir))
    everywhere = set.intersection(*(set(overrides) for overrides in all_overrides))
    cells: list[Cell] = []
    refused: dict[str, list[str]] = {}  # cells by problem
    looked_at: dict[str, list[str]] = {}

    def data_problems(config: Config) -> list[str]:
        key = f"{config.data} {config.model.vocab}"
        if key not in looked_at:
            looked_at[key] = corpus.check(config)
        return looked_at[key]

    for overrides in map(list, all_overrides):
        differs = [override for override in overrides if override not in everywhere]
        try:
            cell = _cell(*composer.compose(overrides), overrides, differs, outputs)
            driver.preflight(cell.config, cell.run_dir, data_problems)
            cells.append(cell)
        except (UserError, *cli.CONFIG_ERRORS) as error:
            problems = error.problems if isinstance(error, UserError) else cli.reasons(error, overrides)
            for problem in problems:
                refused.setdefault(problem, []).append(label(differs))
    if refused:
        raise UserError.of([_with_cells(problem, where, len(all_overrides)) for problem, where in refused.items()])
    return cells


def _with_cells(problem: str, where: list[str], count: int) -> str:
    """Return the problem with the cells that have it."""
    if len(where) == count or problem.startswith(where[0]):
        return problem
    if len(where) == 1:
        return f"{where[0]}: {problem}"
    more = f"; and {len(where) - SHOWN:,} more" if len(where) > SHOWN else ""
    return f"{problem} (in {len(where):,} of {count:,} cells: {'; '.join(where[:SHOWN])}{more})"


def cell(composer: Composer, overrides: list[str], differs: list[str], outputs: Path) -> Cell:
    """Compose and check one cell.

    Raises:
        UserError: listing its problems.
    """
    try:
        composed = _cell(*composer.compose(overrides), overrides, differs, outputs)
    except cli.CONFIG_ERRORS as error:
        raise UserError.of(cli.reasons(error, overrides)) from None
    driver.preflight(composed.config, composed.run_dir)
    return composed


def _cell(
    composed: DictConfig, choices: dict[str, Any], overrides: list[str], differs: list[str], outputs: Path
) -> Cell:
    job = cli.resolve(composed, choices, overrides, outputs)
    return Cell(overrides, job.config, job.run_dir(outputs), differs)


def plans(loader: Any, master: DictConfig, all_overrides: Sequence[Sequence[str]]) -> list[Composed]:
    """Compose a grid of plans: each cell's configuration, or its problems."""
    composer = Composer(loader, master)
    results: list[Composed] = []
    for overrides in map(list, all_overrides):
        try:
            results.append((overrides, cli.resolve(*composer.compose(overrides), overrides).config))
        except UserError as error:
            results.append((overrides, error.problems))
        except cli.CONFIG_ERRORS as error:
            results.append((overrides, [str(error).splitlines()[0]]))
    return results


def is_plan(master: DictConfig) -> bool:
    """Return whether the grid is of plans."""
    return plan.is_plan(master)
