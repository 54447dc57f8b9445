"""Display of a grid: its plan, a live table, a line per cell, and a table of all at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gpt.config import derived
from gpt.config.cluster import Device
from gpt.config.derived import global_batch_size
from gpt.config.schema import Config
from gpt.plan import devices, flops, memory, step_time
from gpt.plan.summary import duration, layout
from gpt.runs.grid import Cell, Folder, State
from gpt.utils import machine
from gpt.utils.console import Console

SHOWN_CELLS = 100  # of those not done, in the table at the end
GIB = 2**30


@dataclass
class CellOutcome:
    """Outcome of a cell in this start of the grid; ``before`` is its state at the beginning."""

    state: str = "waiting"
    before: State = State.new
    code: int | None = None
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        """Whether the cell is unfinished and no driver runs it."""
        return self.state in ("failed", "stopped", "not started", "waiting", "running")


@dataclass(frozen=True)
class Line:
    """A running cell, its newest record, and the seconds since its start."""

    cell: Cell
    record: dict[str, Any]
    seconds: float


def plan(console: Console, folder: Folder, cells: list[Cell], outcomes: dict[str, CellOutcome], count: int) -> None:
    """Show the cells that are about to run, alike ones in one row."""
    states = Counter(outcomes[cell.name].before for cell in cells)
    words = ", ".join(f"{states[state]:,} {_WORDS[state]}" for state in State if states[state])
    kind = "GPUs" if derived.resolve_device(cells[0].config) is Device.gpu else f"on {machine.cores()} cores"
    rows = [("cells", f"{len(cells):,}: {words}"), ("slots", f"{count} {kind}"), ("folder", str(folder.path))]
    left = [cell for cell in cells if outcomes[cell.name].before is not State.done]
    seconds = [_seconds(cell.config) for cell in left]
    known = [s * cell.ranks for s, cell in zip(seconds, left, strict=True) if s is not None]
    if left and len(known) == len(left):
        rows.append(("time", f"about {duration(sum(known) / count)} if nothing was done yet"))
    console.table(f"grid {folder.path.name}", rows)
    training = [cell for cell in cells if cell.trains]
    if training:
        kinds = Counter(_kind(cell) for cell in training)
        table = [(f"{number:,}", *kind) for kind, number in kinds.items()]
        console.columns("plan", ("cells", "model", "params", "layout", "slots", "tokens", "GiB/rank", "takes"), table)


_WORDS = {
    State.new: "new",
    State.done: "done before",
    State.interrupted: "interrupted, go on",
    State.failed: "failed before, again",
    State.running: "running elsewhere",
}


def _kind(cell: Cell) -> tuple[str, ...]:
    config = cell.config
    tokens = config.trainer.max_steps * global_batch_size(config) * config.data.seq_len
    seconds = _seconds(config)
    return (
        config.model.name,
        f"{flops.parameters(config):,}",
        layout(config),
        str(cell.ranks),
        f"{tokens:,}",
        f"{memory.memory(config).total / GIB:.3g}",
        f"about {duration(seconds)}" if seconds is not None else "-",
    )


def _seconds(config: Config) -> float | None:
    """Return the predicted seconds of a whole cell; None if the device is unknown."""
    step = step_time.cost(replace(config, device=devices.known_device(config))) if config.task.facts.trains else None
    return step.seconds * config.trainer.max_steps if step else None


def ending(cell: Cell, outcome: CellOutcome, *, retry: bool) -> str:
    """Return a line about a cell that has ended."""
    value = cell.value() if outcome.state in ("done", "pruned") else None
    loss = f"  val/loss {value:.4f}" if value is not None else ""
    code = f" with exit code {outcome.code}" if outcome.state == "failed" else ""
    again = ", tried again" if retry else ""
    word = outcome.state.upper() if outcome.state == "failed" else outcome.state
    return f"{word}: {cell.label}{loss}{code}  {clock(outcome.seconds)}{again}"


def table(lines: list[Line], foot: str, height: int) -> RenderableType:
    """Return a table of the running cells, as many as fit, and a line about the others."""
    drawn = Table(box=None, expand=True, padding=(0, 1, 0, 0), header_style="dim")
    drawn.add_column("cell", no_wrap=True, overflow="ellipsis", ratio=1)
    for name in ("step", "loss", "tok/s", "time", "left"):
        drawn.add_column(name, justify="right", no_wrap=True)
    room = max(1, height - 4)
    for line in lines[: room if len(lines) <= room else room - 1]:
        drawn.add_row(Text(line.cell.label), *_figures(line))
    more = [Text(f"and {len(lines) - room + 1} more", style="dim")] if len(lines) > room else []
    return Group(drawn, *more, Text(foot, style="bold", no_wrap=True, overflow="ellipsis"))


def _figures(line: Line) -> tuple[str, ...]:
    steps, record = line.cell.config.trainer.max_steps, line.record
    if not line.cell.trains or not record:
        return ("starting" if line.cell.trains else line.cell.config.task.value, "", "", clock(line.seconds), "")
    config, rate = line.cell.config, record.get("tokens_per_second") or 0.0
    left = (steps - record["step"]) * global_batch_size(config) * config.data.seq_len / rate if rate else None
    return (
        f"{record['step']:,}/{steps:,}",
        f"{record['train/loss']:.3f}",
        f"{rate:,.0f}",
        clock(line.seconds),
        clock(left) if left is not None else "",
    )


def tally(outcomes: Iterable[CellOutcome]) -> str:
    """Return a sentence with the number of cells in each state."""
    states = Counter(outcome.state for outcome in outcomes)
    states["done"] += states.pop("done before", 0) + states.pop("done elsewhere", 0)
    known = ("done", "failed", "running", "waiting", "not started", "elsewhere", "stopped", "pruned")
    order = [*known, *sorted(set(states) - set(known))]
    words = ", ".join(f"{states[state]} {state}" for state in order if states[state])
    return f"{sum(states.values())} cells: {words}"


def closing(console: Console, cells: list[Cell], outcomes: dict[str, CellOutcome], seconds: float) -> None:
    """Show the cells that are not done, and the counts; the report has the figures of all."""
    left = [cell for cell in cells if not outcomes[cell.name].state.startswith("done")]
    rows: list[tuple[str, ...]] = []
    for cell in left[:SHOWN_CELLS]:
        outcome = outcomes[cell.name]
        lasted = clock(outcome.seconds) if outcome.seconds else "-"
        code = str(outcome.code) if outcome.code is not None else "-"
        rows.append((cell.label, outcome.state, code, lasted, cell.run_dir.name))
    if rows:
        console.columns("not done", ("cell", "state", "exit code", "time", "run"), rows)
    if len(left) > len(rows):
        console.note(f"and {len(left) - len(rows):,} more")
    if elsewhere := [cell.label for cell in cells if outcomes[cell.name].state == "elsewhere"]:
        console.note(f"still running elsewhere: {'; '.join(elsewhere[:SHOWN_CELLS])}")
    console.note(f"{tally(outcomes.values())} | {clock(seconds)}")


def clock(seconds: float) -> str:
    """Format seconds as hours, minutes, seconds.

    Example:
        >>> clock(75), clock(3675)
        ('1:15', '1:01:15')
    """
    whole = round(seconds)
    hours = f"{whole // 3600}:{whole % 3600 // 60:02}" if whole >= 3600 else f"{whole // 60}"
    return f"{hours}:{whole % 60:02}"
