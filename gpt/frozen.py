"""A command that was composed and checked before: ``python -m gpt.frozen FILE``. What a grid and a cluster start.

It is the driver of its run like any other: it checks this machine, starts the ranks, and ends with the exit codes of
``gpt.main``. Hydra is not here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from gpt import driver, ends
from gpt.grid.cells import Cell
from gpt.guard import die_with_parent
from launchers.pool import PARENT
from launchers.slots import CORES


def main() -> None:
    """Run it."""
    if parent := os.environ.pop(PARENT, ""):  # a pool: whatever ends it ends us, kindly
        die_with_parent(int(parent))
    if cores := os.environ.pop(CORES, ""):
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    ends.run(_command)


def _command() -> None:
    cell = Cell.thaw(Path(sys.argv[1]))
    driver.gate(cell.config, cell.run_dir)
    driver.run(cell.config, cell.run_dir, cell.overrides)


if __name__ == "__main__":
    main()
