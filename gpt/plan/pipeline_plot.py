"""The pipeline's step as a picture: a row per stage, time to the right."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.plan.pipeline_schedule import Kind
from gpt.plan.pipeline_simulation import Event, Timeline

# Of Okabe and Ito 2008, told apart by people who see colours differently; chunks are shades of them.
FORWARD, BACKWARD, REDUCTION, UPDATE = "#0072B2", "#E69F00", "#009E73", "#999999"
WIDTH = 13.0  # inches
ROW, ROWS = 0.36, 14.0  # inches: of a row, and of all rows at most
SMALLEST = 5.0  # points: smaller numbers are left out
SLOTS = 60  # passes forward and back that one panel shows; longer steps are cut in the middle


def draw(timeline: Timeline, path: Path, title: str = "") -> Path:
    """Write an SVG or PNG: forward passes blue, backward passes orange, with micro batch numbers where they fit.

    A long step is shown by its beginning and its end. At the right is the share of the passes' time that each stage
    waits.

    Args:
        timeline: what is drawn.
        path: its suffix chooses the format.
        title: before the figures of the first line.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = timeline.pipeline.stages
    spans = _spans(timeline)
    row = min(ROW, ROWS / stages)
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gpt", "font.size": 10}):
        figure, panels = pyplot.subplots(
            1, len(spans), figsize=(WIDTH, stages * row + 1.5), squeeze=False,
            gridspec_kw={"wspace": 0.025, "width_ratios": [end - begin for begin, end in spans]},
        )  # fmt: skip
        figure.subplots_adjust(
            left=0.08, right=0.925, top=1 - 0.75 / figure.get_figheight(), bottom=0.62 / figure.get_figheight()
        )
        unit, scale = ("s", 1.0) if timeline.step >= 1 else ("ms", 1e3)
        for axes, span in zip(panels[0], spans, strict=True):
            inches = axes.get_position().width * WIDTH
            _panel(axes, _Panel(timeline, span, scale, inches / ((span[1] - span[0]) * scale) * 72, row * 72))
        _frame(panels[0], timeline, row * 72)
        figure.supxlabel(f"time ({unit})", y=0.06 / figure.get_figheight(), fontsize=10)
        figure.suptitle(_heading(timeline, title), x=0.08, y=1 - 0.1 / figure.get_figheight(), ha="left", fontsize=12)
        _legend(figure, timeline)
        metadata = {"Date": None} if path.suffix == ".svg" else None  # the same plan gives the same file
        figure.savefig(path, dpi=110, facecolor="white", metadata=metadata)
        pyplot.close(figure)
    return path


@dataclass(frozen=True)
class _Panel:
    """One window on the step; ``points`` is the width of a unit of time, ``height`` of a row."""

    timeline: Timeline
    span: tuple[float, float]
    scale: float
    points: float
    height: float


def _spans(timeline: Timeline) -> list[tuple[float, float]]:
    """What is shown of the step: all, or its two ends."""
    p = timeline.pipeline
    slot = timeline.passes / (p.micros * p.chunks + p.stages)
    first_back = min(event.begin for event in timeline.events[0] if event.kind is Kind.backward)
    shown = max(SLOTS / 2 * slot, 1.4 * first_back, p.stages * 1.6 * slot)
    if timeline.passes <= SLOTS * 1.25 * slot or 2 * shown > 0.8 * timeline.step:
        return [(0, timeline.step)]
    return [(0, shown), (timeline.passes - shown, timeline.step)]


def _heading(timeline: Timeline, title: str) -> str:
    p = timeline.pipeline
    parts = f"{p.stages} stage{'s' * (p.stages > 1)}" + (f" x {p.chunks} chunks" if p.chunks > 1 else "")
    shape = f"{p.order.value}, {parts}, {p.micros:,} micro batches"
    figures = f"step {_seconds(timeline.step)}, idle {timeline.bubble:.1%} of {_seconds(timeline.passes)} of passes"
    return "  ".join(filter(None, [title, f"{shape}: {figures}"]))


def _seconds(time: float) -> str:
    return f"{time:,.4g} s" if time >= 1 else f"{time * 1e3:,.4g} ms"


def _panel(axes: Any, panel: _Panel) -> None:
    """The passes of one window, and what follows them."""
    line, (begin, end) = panel.timeline, panel.span
    axes.set_xlim(begin * panel.scale, end * panel.scale)
    axes.set_ylim(line.pipeline.stages - 0.5, -0.5)
    seen = [event for events in line.events for event in events if event.end > begin and event.begin < end]
    bars: dict[Any, list[tuple[int, float, float]]] = defaultdict(list)
    for event in seen:
        bars[_colour(event.kind, event.chunk, line.pipeline.chunks)].append((event.stage, event.begin, event.end))
    for stage, events in enumerate(line.events):
        bars[REDUCTION].append((stage, events[-1].end, line.reduced[stage]))
        bars[UPDATE].append((stage, max(line.reduced), line.step))
    narrowest = min(event.end - event.begin for event in seen) * panel.scale * panel.points
    for colour, spans in bars.items():
        _bars(axes, colour, [s for s in spans if s[2] > s[1]], panel.scale, edge=0.5 if narrowest > 2 else 0)
    for kind in Kind:
        _numbers(axes, [e for e in seen if e.kind is kind and e.begin >= begin and e.end <= end], panel)


def _bars(axes: Any, colour: Any, spans: list[tuple[int, float, float]], scale: float, edge: float) -> None:
    """Rectangles of one colour as one shape, which keeps an SVG small."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Shape

    corners, codes = [], []
    for stage, begin, end in spans:
        left, right, top, bottom = begin * scale, end * scale, stage - 0.4, stage + 0.4
        corners += [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
        codes += [Shape.MOVETO, Shape.LINETO, Shape.LINETO, Shape.LINETO, Shape.CLOSEPOLY]
    if corners:
        axes.add_patch(PathPatch(Shape(corners, codes), facecolor=colour, edgecolor="white", linewidth=edge))


def _colour(kind: Kind, chunk: int, chunks: int) -> tuple[float, ...]:
    """Full for the first chunk, paler for each that follows."""
    from matplotlib.colors import to_rgb

    pale = 0.62 * chunk / max(chunks - 1, 1)
    return tuple(part + (1 - part) * pale for part in to_rgb(FORWARD if kind is Kind.forward else BACKWARD))


def _numbers(axes: Any, events: list[Event], panel: _Panel) -> None:
    """Micro batches in their bars, if the widest number can be read in the narrowest bar."""
    if not events:
        return
    width = min(event.end - event.begin for event in events) * panel.scale * panel.points
    digits = max(len(str(event.micro)) for event in events)
    size = min(9.0, panel.height * 0.5, width / (0.62 * digits + 0.3))
    if size < SMALLEST:
        return
    for event in events:
        dark = event.kind is Kind.forward and event.chunk * 2 < panel.timeline.pipeline.chunks
        middle = (event.begin + event.end) / 2 * panel.scale
        axes.text(
            middle, event.stage, str(event.micro), ha="center", va="center_baseline", fontsize=size,
            color="white" if dark else "black",
        )  # fmt: skip


def _frame(panels: Any, timeline: Timeline, height: float) -> None:
    """Stages at the left, idle shares at the right, marks where time is left out."""
    stages = range(timeline.pipeline.stages)
    size = max(SMALLEST, min(10.0, height * 0.75))
    for axes in panels:
        axes.set_yticks([])
        axes.tick_params(axis="x", labelsize=9)
        for side in ("top", "left", "right"):
            axes.spines[side].set_visible(False)
        for stage in [*stages, len(stages)]:
            axes.axhline(stage - 0.5, color="#dddddd", linewidth=0.6, zorder=0)
    first, last = panels[0], panels[-1]
    first.set_yticks(stages, [f"stage {stage}" for stage in stages], fontsize=size)
    right = last.secondary_yaxis("right")
    right.set_yticks(stages, [f"{timeline.idle(stage):.1%} idle" for stage in stages], fontsize=size)
    right.spines["right"].set_visible(False)
    for axis in (first.yaxis, right.yaxis):
        axis.set_tick_params(length=0)
    if len(panels) > 1:
        dash = {"color": "#666666", "linestyle": (0, (2, 2)), "linewidth": 1.0}
        first.axvline(first.get_xlim()[1], **dash)
        last.axvline(last.get_xlim()[0], **dash)


def _legend(figure: Any, timeline: Timeline) -> None:
    from matplotlib.patches import Patch

    chunks = timeline.pipeline.chunks
    shown: list[tuple[Any, str]] = []
    for kind, name in ((Kind.forward, "forward"), (Kind.backward, "backward")):
        for chunk in sorted({0, chunks - 1}):
            label = f"{name}, chunk {chunk}" if chunks > 1 else name
            shown.append((_colour(kind, chunk, chunks), label))
    if any(timeline.pipeline.reduction):
        shown.append((REDUCTION, "gradients over replicas"))
    if timeline.pipeline.update:
        shown.append((UPDATE, "update"))
    handles = [Patch(color=colour, label=label) for colour, label in shown]
    figure.legend(
        handles=handles, loc="upper left", ncols=len(handles), frameon=False, fontsize=10, handlelength=1.2,
        bbox_to_anchor=(0.073, 1 - 0.33 / figure.get_figheight()), borderaxespad=0,
    )  # fmt: skip
