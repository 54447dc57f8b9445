"""What the driver shows: a header, a live progress bar in a terminal, plain lines in a pipe."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from rich import box
from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0
BARS = "▁▂▃▄▅▆▇█"


class Display(Protocol):
    """Where a running job appears. ``live``: it draws the steps itself, workers need not print them."""

    live: bool

    def line(self, text: str) -> None:
        """A line that rank 0 printed."""

    def records(self, lines: list[str]) -> None:
        """New lines of ``metrics.jsonl``."""


class Console:
    """Rich in a terminal; in a pipe the same words without colour and without being cut to a width."""

    def __init__(self) -> None:
        self._rich = RichConsole(highlight=False, soft_wrap=True)

    def note(self, text: str, style: str = "") -> None:
        """A sentence."""
        self._rich.print(Text(text, style=style))

    def show(self, text: str) -> None:
        """Text as it is, also half a line."""
        self._rich.print(Text(text), end="")

    def warn(self, text: str) -> None:
        """A sentence that matters."""
        self._rich.print(Text(f"WARNING: {text}", style="yellow"))

    def header(self, rows: list[tuple[str, str]]) -> None:
        """What is about to run, and where things go."""
        self.table("gpt", rows)

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Rows of (what, how much)."""
        if not self._rich.is_terminal:
            width = max(len(what) for what, _ in rows)
            self.note(f"== {title} ==")
            for what, value in rows:
                self.note(f"{what:<{width}}  {value}")
            return
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=False)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for what, value in rows:
            table.add_row(what, Text(value))
        self._rich.print(table, soft_wrap=False)

    def columns(self, title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        """Rows of equally many cells: columns of figures to the right, of words to the left."""
        columns = list(zip(header, *rows, strict=True))
        figures = [all(cell[:1] in "+-0123456789" for cell in column[1:]) for column in columns]
        if not self._rich.is_terminal:
            widths = [max(map(len, column)) for column in columns]
            self.note(f"== {title} ==")
            for row in (header, *rows):
                cells = zip(row, widths, figures, strict=True)
                self.note("  ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in cells).rstrip())
            return
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name, right in zip(header, figures, strict=True):
            table.add_column(name, justify="right" if right else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        self._rich.print(table, soft_wrap=False)

    def verdict(self, lines: list[str], good: bool | None) -> None:
        """A judgement: the first line says it."""
        style = {True: "bold green", False: "bold red", None: ""}[good]
        self._rich.print(Text("verdict: ", style="cyan") + Text(lines[0], style=style))
        for line in lines[1:]:
            self.note(f"  {line}")

    def next_commands(self, commands: list[tuple[str, str]]) -> None:
        """What to try next."""
        self.note("next:")
        for command, why in commands:
            self._rich.print(Text(f"  {command}", style="green") + Text(f"   # {why}", style="dim"))

    @staticmethod
    def curve(values: list[float]) -> str:
        """A line of block characters, the largest value the tallest.

        Example:
            >>> Console.curve([0.0, 1.0])
            '▁█'
        """
        top = max(values) or 1.0
        return "".join(BARS[min(len(BARS) - 1, int(value / top * len(BARS)))] for value in values)

    @contextmanager
    def progress(self, steps: int | None) -> Iterator[Display]:
        """While a job runs; ``steps`` is the horizon, None for a job without steps."""
        if steps is None or not self._rich.is_terminal:
            yield _Plain(self)
            return
        columns = (
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._rich, transient=False, expand=True) as bar:
            yield _Live(bar, bar.add_task("train", total=steps, figures="starting"))

    @contextmanager
    def live(self) -> Iterator[Screen]:
        """While many jobs run: in a terminal, the place below all lines where they are drawn."""
        if not self._rich.is_terminal:
            yield Screen(None)
            return
        with Live(console=self._rich, auto_refresh=False, transient=True) as live:
            yield Screen(live)

    @contextmanager
    def measure(self) -> Iterator[Callable[[ReadProgress], None]]:
        """While text is prepared; yields what is to be told the tally: a bar, or in a pipe a line every ten seconds."""
        times: list[float] = []  # when the first tally came, and when the last line was written

        def began() -> float:
            times.extend([time.monotonic()] * 2 if not times else [])
            return times[0]

        if not self._rich.is_terminal:

            def line(tally: ReadProgress) -> None:
                pace = _pace(tally, began())
                if time.monotonic() - times[1] >= SECONDS_BETWEEN_LINES:
                    times[1] = time.monotonic()
                    self.note(f"{tally.progress / 1e6:,.0f} of {tally.total / 1e6:,.0f} MB  {pace}")

            yield line
            return
        columns = (TextColumn("{task.percentage:>3.0f}%"), BarColumn(bar_width=None), TextColumn("{task.fields[pace]}"))
        with Progress(*columns, console=self._rich, expand=True) as bar:
            task = bar.add_task("prepare", total=None, pace="starting")

            def draw(tally: ReadProgress) -> None:
                bar.update(task, total=tally.total or None, completed=tally.progress, pace=_pace(tally, began()))

            yield draw


def _pace(tally: ReadProgress, began: float) -> str:
    """Speed of what this start did, and how long the rest takes at it."""
    seconds = max(time.monotonic() - began, 1e-9)
    rate = (tally.text - tally.reused) / seconds
    here = tally.progress * (1 - tally.reused / max(tally.text, 1))
    left = (tally.total - tally.progress) * seconds / here if here > 0 and tally.total else None
    eta = f"  eta {left // 3600:.0f}:{left % 3600 // 60:02.0f}:{left % 60:02.0f}" if left is not None else ""
    return f"{rate / 1e6:.1f} MB/s  {tally.documents:,} documents{eta}"


class Screen:
    """Where something is drawn anew again and again; nowhere in a pipe."""

    def __init__(self, live: Live | None) -> None:
        self._live = live

    @property
    def drawn(self) -> bool:
        """Whether there is a terminal."""
        return self._live is not None

    @property
    def height(self) -> int:
        """Lines that there are."""
        return self._live.console.height if self._live else 0

    def draw(self, what: RenderableType) -> None:
        """Replace what was drawn."""
        if self._live:
            self._live.update(what, refresh=True)


class _Plain:
    live = False

    def __init__(self, console: Console) -> None:
        self._console = console

    def line(self, text: str) -> None:
        self._console.note(text)

    def records(self, lines: list[str]) -> None:
        """The worker prints its steps itself."""


class _Live:
    live = True

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar = bar
        self._task = task

    def line(self, text: str) -> None:
        self._bar.console.print(Text(text))

    def records(self, lines: list[str]) -> None:
        if not lines:
            return
        try:
            record = json.loads(lines[-1])
        except ValueError:
            return
        figures = f"loss {record['train/loss']:.3f}  lr {record['lr']:.2e}  {record['tokens_per_second']:,.0f} tok/s"
        if "tokens_per_second_per_device" in record:
            figures += f" ({record['tokens_per_second_per_device']:,.0f} per device)"
        if "mfu" in record:
            figures += f"  mfu {record['mfu']:.1%}"
        self._bar.update(self._task, completed=record["step"], figures=figures)


@dataclass
class ReadProgress:
    """What has been read, in the order of the input; what the user sees of it."""

    progress: int = 0  # bytes of the input
    total: int = 0
    text: int = 0  # bytes of text that were encoded
    reused: int = 0  # of them, by an earlier start
    documents: int = 0
    records: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    shown: list[str] = field(default_factory=list)


def say(line: str) -> None:
    """A line for people, on the worker's own standard output: its log, and the terminal for rank 0."""
    print(line, flush=True)
