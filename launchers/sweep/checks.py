"""Check a grid as a whole, before anything of it is started or written."""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.types import Glob, Override, RangeSweep
from omegaconf import DictConfig

from gpt.config import derived
from gpt.config.cluster import Device
from gpt.config.task_schemas import Section
from gpt.runs.grid import Cell
from gpt.tasks import plan
from gpt.utils.console import Console
from gpt.utils.errors import UserError

OF_ALL = ("grid", "yes", "hydra", "report", "optuna")  # keys that have one value for the whole grid
FOLDERS = ("hydra.run.dir", "hydra.sweep.subdir")


def before(overrides: Sequence[Override], master: DictConfig, console: Console) -> None:
    """Check the command before its cells are composed: composing takes time, counting does not.

    Raises:
        UserError: there are no cells, or more than was meant.
    """
    problems, count = [], 1
    for override in overrides:
        if not override.is_sweep_override():
            continue
        if not (override.is_discrete_sweep() or isinstance(override.value(), Glob)):
            problems.append(f"{override.input_line}: a grid needs single values; hparams=optuna searches an interval")
            continue
        key, cells = override.key_or_group, _values(override)
        count *= cells
        if key.split(".")[0].split("/")[0] in OF_ALL:
            problems.append(f"{key} is of the whole grid: give it one value")
        if not cells:
            pattern = override.input_line or key
            problems.append(f"{pattern}: nothing has such a name, so there are no cells")
    for override in master.hydra.overrides.hydra:
        key = str(override).lstrip("+").partition("=")[0]
        if key in FOLDERS:
            problems.append(
                f"{override}: each cell of a grid has the folder of its run; hydra.sweep.dir=... is the one they are in"
                + (", checkpoint=... a trained run that they read" if key == FOLDERS[0] else "")
            )
    if problems:
        raise UserError.of(problems)
    if not plan.is_plan(master):
        _agree(count, int(master.grid.confirm_above), bool(master.yes), console)


def _values(override: Override) -> int:
    """Return the number of swept values; a range is not expanded."""
    value = override.value()
    if isinstance(value, RangeSweep):
        assert value.start is not None
        assert value.stop is not None
        return max(0, math.ceil((value.stop - value.start) / value.step))
    if isinstance(value, Glob) or override.is_discrete_sweep():
        return sum(1 for _ in override.sweep_iterator())
    return 1


def _agree(count: int, limit: int, granted: bool, console: Console) -> None:
    if count <= limit or granted:
        return
    if sys.stdin.isatty() and sys.stdout.isatty():
        console.show(f"{count:,} cells: start them? [y/N] ")
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
        raise UserError("nothing was started")
    raise UserError.of([f"{count:,} cells are more than grid.confirm_above={limit}: if you mean it, add yes=true"])


def together(cells: list[Cell], outputs: Path) -> None:
    """Check the cells, each of which is valid by itself, together.

    Raises:
        UserError: they cannot be one grid.
    """
    problems = []
    devices = sorted({derived.resolve_device(cell.config).value for cell in cells})
    if len(devices) > 1:
        problems.append(f"cells on {' and '.join(devices)}: a grid shares out one kind of device: make a grid of each")
    kinds = sorted({cell.config.cluster.kind.value for cell in cells})
    if len(kinds) > 1:
        problems.append(f"cluster={','.join(kinds)}: the cells of a grid run in one place: make a grid of each")
    sections = [getattr(cell.config, cell.config.task.name, None) for cell in cells]
    unattended = [s.unattended_problems("a grid (-m)") for s in sections if isinstance(s, Section)]
    problems += dict.fromkeys(itertools.chain.from_iterable(unattended))
    if reason := _unwritable(outputs):
        problems.append(f"{outputs}: cannot be written ({reason}): choose another folder with hydra.sweep.dir=...")
    if problems:
        raise UserError.of(problems)


def _unwritable(folder: Path) -> str:
    """Return why a folder, which need not exist yet, cannot be written, or ''."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        return f"{folder} is not a folder"
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"no permission to write in {folder}"


def slots(cells: list[Cell], count: int) -> None:
    """Check that each cell fits in the slots of this host.

    Raises:
        UserError: a cell would wait for ever.
    """
    gpu = derived.resolve_device(cells[0].config) is Device.gpu
    needs: dict[int, list[Cell]] = {}
    for cell in cells:
        if cell.ranks > count:
            needs.setdefault(cell.ranks, []).append(cell)
    share = "" if gpu else f", or let ranks share cores with grid.slots={max(needs, default=0)}"
    if problems := [
        f"{group[0].label}{f' and {len(group) - 1:,} more' if len(group) > 1 else ''}: a cell of {ranks:,} ranks takes "
        f"{ranks:,} slots, and there are {count} ({'GPUs' if gpu else 'cores'}): choose a smaller parallel=...{share}"
        for ranks, group in needs.items()
    ]:
        raise UserError.of(problems)
