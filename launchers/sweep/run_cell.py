"""Run a frozen cell: ``python -m launchers.sweep.run_cell FILE``, as grids and cluster scripts do.

It is the driver of its run like any other: it checks this machine, starts the ranks, and ends with the exit codes of
``gpt.main``. Hydra is not here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from gpt.runs.grid import Cell
from gpt.utils.launch_env import WorkerEnv
from gpt.utils.signals import die_with_parent
from launchers import driver, exit_codes


def main() -> None:
    """Run the cell in the file of the first argument."""
    settings = WorkerEnv.from_env(os.environ)
    if settings.parent:  # a pool: whatever ends it ends us, and the ranks save
        die_with_parent(settings.parent)
    if settings.cores:
        os.sched_setaffinity(0, settings.cores)
    exit_codes.run(_command)


def _command() -> None:
    cell = Cell.load(Path(sys.argv[1]))
    driver.preflight(cell.config, cell.run_dir)
    driver.run(cell.config, cell.run_dir, cell.overrides)


if __name__ == "__main__":
    main()
