"""Runs a grid on this host: what is done is skipped, the rest runs side by side, and all that happened is shown."""

from __future__ import annotations

import sys
from pathlib import Path

from gpt import runs
from gpt.config import Device, UserError
from gpt.console import Console
from gpt.grid.cells import Cell, State
from gpt.grid.folder import Folder
from gpt.launching import JobFailed
from launchers import host
from launchers.pool import Entry, Pool, Running
from launchers.slots import Slots

SHOWN_LINES = 15
RETRIED = (1, 3)  # failed, or stopped by the guard; bad input stays bad


def run(cells: list[Cell], folder: Folder, command: list[str], console: Console) -> dict[str, int]:
    """Run what is left of a grid; returns the exit code of each cell.

    Raises:
        UserError: a cell needs more slots than there are.
        JobFailed: the grid was stopped.
    """
    settings, device = cells[0].config.grid, host.resolve_device(cells[0].config)
    gpu = device is Device.gpu
    count = settings.slots or (host.gpus() if gpu else host.cores())
    if problems := [_too_big(cell, count, gpu=gpu) for cell in cells if cell.ranks > count]:
        raise UserError.of(problems)
    folder.add(cells, command)
    codes: dict[str, int] = {}
    entries = []
    for cell in cells:
        state = cell.state()
        if state is State.done:
            codes[cell.name] = 0
            console.note(f"done before: {cell.name}  {' '.join(cell.differs)}")
        elif state is State.running:
            console.note(f"running elsewhere: {cell.name}  {' '.join(cell.differs)}")
        else:
            start = [sys.executable, "-m", "gpt.frozen", str(folder.frozen(cell))]
            entries.append(Entry(cell.name, start, cell.ranks, folder.log(cell.name), runs.lock_of(cell.run_dir)))

    def started(job: Running) -> None:
        folder.note(job.entry.name, "started", attempt=job.entry.attempt, slots=job.taken.numbers)
        console.note(f"started: {job.entry.name}")

    def ended(job: Running, code: int) -> bool:
        codes[job.entry.name] = code
        folder.note(job.entry.name, "ended", code=code, attempt=job.entry.attempt)
        console.note(f"ended with {code}: {job.entry.name}")
        if code:
            for line in _last_lines(job.entry.log):
                console.note(f"  | {line}")
        return code in RETRIED and job.entry.attempt <= settings.retries

    pool = Pool(
        Slots(count, gpu=gpu),
        started=started,
        ended=ended,
        elsewhere=lambda entry: console.note(f"running elsewhere: {entry.name}"),
        poll=lambda running, waiting: None,
    )
    pool.run(entries)
    if pool.stopped_by:
        raise JobFailed("stopped; the same command goes on", 128 + pool.stopped_by)
    return codes


def value(cell: Cell) -> float | None:
    """What a sweeper minimises: the validation loss of a cell's run."""
    result = runs.read_result(cell.run_dir)
    found = result.get("val/loss") if result else None
    return float(found) if found is not None else None


def _too_big(cell: Cell, count: int, *, gpu: bool) -> str:
    kind = "GPUs" if gpu else "cores"
    return (
        f"{' '.join(cell.differs)}: needs {cell.ranks} slots, and this host has {count} ({kind}): "
        f"choose a smaller parallel=..." + ("" if gpu else f", or share the cores with grid.slots={cell.ranks}")
    )


def _last_lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]
