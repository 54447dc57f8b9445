"""Run a grid on this host: cells that are done are skipped, the others run side by side, with a live display."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from gpt.config import derived
from gpt.config.cluster import Device
from gpt.runs import run_dir
from gpt.runs.grid import STOPPED, Cell, Folder, State
from gpt.utils import machine
from gpt.utils.console import Console
from gpt.utils.errors import JobFailed
from gpt.utils.outcome import SHOWN_LINES
from gpt.utils.signals import BAD_INPUT
from launchers.sweep import checks, display
from launchers.sweep.display import CellOutcome, Line
from launchers.sweep.pool import Pool, PoolJob, Running
from launchers.sweep.slots import Slots

PRINTED_LINES = 40  # of one whose output is what it was started for
SHOW_SECONDS = 0.5


@dataclass(frozen=True)
class Live:
    """A running cell: the newest record of its ``metrics.jsonl`` (empty before the first), and a handle to end it."""

    cell: Cell
    record: dict[str, float]
    job: Running

    def prune(self) -> None:
        """End the cell after it has saved; it is not started again in this batch."""
        self.job.prune()


class Runner:
    """The cells of a grid as jobs of a pool, and their display."""

    def __init__(
        self, cells: list[Cell], folder: Folder, console: Console, watch: Callable[[list[Live]], None] | None
    ) -> None:
        config = cells[0].config
        gpu = derived.resolve_device(config) is Device.gpu
        self.settings = config.grid
        self.count = self.settings.slots or (machine.gpus() if gpu else machine.cores())
        self.slots = Slots(self.count, gpu=gpu)
        self.cells = {cell.name: cell for cell in cells}
        self.folder, self.console, self.watch = folder, console, watch
        self.outcomes = {cell.name: CellOutcome() for cell in cells}
        self.pool = Pool(self.slots, self)
        self.stopping = False
        self.began = self._shown = time.monotonic()

    def look(self) -> list[PoolJob]:
        """Return the jobs of the cells that are not done."""
        last = self.folder.last_events()
        entries = []
        for name, cell in self.cells.items():
            outcome = self.outcomes[name]
            outcome.before = self.folder.state(cell, last.get(name, {}))
            if outcome.before is State.done:
                outcome.state = "done before"
            else:
                entries.append(self.entry(cell))
        return entries

    def entry(self, cell: Cell) -> PoolJob:
        """Return a cell's job."""
        start = [sys.executable, "-m", "launchers.sweep.run_cell", str(self.folder.frozen(cell))]
        return PoolJob(cell.name, start, cell.ranks, self.folder.log(cell.name), run_dir.lock_of(cell.run_dir))

    def run(self, entries: list[PoolJob]) -> None:
        """Run the jobs."""
        with self.console.live() as self.screen:
            self.pool.run(entries)

    def wanted(self, entry: PoolJob) -> bool:
        """Return False if another driver has run the cell since ``look``."""
        cell, outcome = self.cells[entry.name], self.outcomes[entry.name]
        if outcome.state != "elsewhere" and entry.attempt:
            return True
        now = cell.last_state()
        if now is State.done or (now is State.failed and outcome.before is not State.failed):
            outcome.state = "done elsewhere" if now is State.done else "failed"
            outcome.code = 0 if now is State.done else 1
            self._say(f"{outcome.state}: {cell.label}")
            return False
        return True

    def started(self, job: Running) -> None:
        """Record and show the start of a cell."""
        cell, outcome = self.cells[job.entry.name], self.outcomes[job.entry.name]
        outcome.state = "running"
        self.folder.note(cell.name, "started", attempt=job.entry.attempt, slots=job.lease.numbers)
        if not self.screen.drawn:
            again = f", attempt {job.entry.attempt}" if job.entry.attempt > 1 else ""
            goes_on = f", from step {step:,}" if (step := cell.record().get("step")) else ""
            self._say(f"started: {cell.label}  ({cell.name}{goes_on}{again})")

    def ended(self, job: Running, code: int) -> bool:
        """Record and show the end of a cell, with the last lines of a failed one; return True to retry it."""
        cell, outcome = self.cells[job.entry.name], self.outcomes[job.entry.name]
        outcome.code, outcome.seconds = code, outcome.seconds + time.monotonic() - job.began
        event = "pruned" if job.pruned and code in STOPPED else "ended"
        self.folder.note(cell.name, event, code=code, attempt=job.entry.attempt)
        outcome.state = _state(event, code)
        retry = outcome.state == "failed" and code != BAD_INPUT and job.entry.attempt <= self.settings.retries
        self._say(display.ending(cell, outcome, retry=retry and not self.stopping), bad=outcome.state == "failed")
        if outcome.state == "failed" or not cell.trains:
            for line in _lines(job, SHOWN_LINES if code else PRINTED_LINES):
                self._say(f"  | {line}")
        if outcome.state == "failed" and not retry and self.settings.fail_fast and not self.stopping:
            self.stopping = True
            self._say("grid.fail_fast: the others are stopped; they save")
            self.pool.stop()
        return retry

    def held_by_other(self, entry: PoolJob) -> None:
        """Show that another driver runs the cell."""
        if self.outcomes[entry.name].state != "elsewhere":
            self.outcomes[entry.name].state = "elsewhere"
            self._say(f"runs elsewhere: {self.cells[entry.name].label}")

    def poll(self, running: list[Running], waiting: list[PoolJob]) -> None:
        """Show the running cells, and pass them to the sweeper."""
        if self.pool.stopped_by and not self.stopping:
            self.stopping = True
            rest = f"; {len(running)} running, which save and end (once more: at once)" if running else ""
            self._say(f"stopped by {self.pool.stopped_by.name}{rest}")
        if time.monotonic() - self._shown < SHOW_SECONDS:
            return
        self._shown = time.monotonic()
        live = [Live(self.cells[job.entry.name], self.cells[job.entry.name].record(), job) for job in running]
        if self.watch:
            self.watch(live)
        if self.screen.drawn:
            lines = [Line(each.cell, each.record, self._shown - each.job.began) for each in live]
            used = sum(len(job.lease.numbers) for job in running)
            far = f"{display.tally(self.outcomes.values())} | slots {used}/{self.count}"
            foot = f"{far} | {display.clock(self._shown - self.began)}"
            self.screen.draw(display.table(lines, foot, self.screen.height))

    def _say(self, text: str, *, bad: bool = False) -> None:
        self.console.note(text, style="red" if bad else "")


def run(
    cells: list[Cell],
    folder: Folder,
    command: list[str],
    console: Console,
    watch: Callable[[list[Live]], None] | None = None,
    *,
    first: bool = True,
) -> dict[str, CellOutcome]:
    """Run the unfinished cells of a grid; return the outcome of each cell, by name.

    Raises:
        UserError: a cell needs more slots than there are.
        JobFailed: the grid was stopped.
    """
    runner = Runner(cells, folder, console, watch)
    checks.slots(cells, runner.count)
    entries = runner.look()
    if first:
        display.plan(console, folder, cells, runner.outcomes, runner.count)
    folder.add(cells, command)
    try:
        runner.run(entries)
    finally:
        for outcome in runner.outcomes.values():
            outcome.state = "not started" if outcome.state == "waiting" else outcome.state
        display.closing(console, cells, runner.outcomes, time.monotonic() - runner.began)
    if runner.pool.stopped_by:
        raise JobFailed("stopped; the same command goes on", 128 + runner.pool.stopped_by)
    return runner.outcomes


def _state(event: str, code: int) -> str:
    if event == "pruned":
        return "pruned"
    return "done" if code == 0 else "stopped" if code in STOPPED else "failed"


def _lines(job: Running, count: int) -> list[str]:
    """Return the last lines that the job has printed in this start."""
    with open(job.entry.log, "rb") as file:
        file.seek(job.output)
        return file.read().decode("utf-8", errors="replace").splitlines()[-count:]
