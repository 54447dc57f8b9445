"""The page of a grid: one HTML file that needs no network. It has the tables; curves come with its script."""

from __future__ import annotations

import html
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from gpt import __version__
from gpt.runs.report.collect import BAD, STATES, Array, Run, tail
from gpt.runs.report.statistics import Group
from gpt.runs.report.summary import Point, Row, Summary, brief, command, figures_of, label, shown, text, verdict
from gpt.utils.files import write_atomic

HERE = Path(__file__).resolve().parent
NAMES = {"tokens_per_second": "tokens/s", "mfu": "MFU", "flops": "FLOPs", "seconds": "time", "step": "steps"}
VERDICTS = {"best": "best", "same": "could be as good", "worse": "worse", "unknown": "cannot be said"}
TAILS = 100  # failures with the end of their log


def write(summary: Summary, home: Path, title: str) -> Path:
    """Write ``report.html`` into ``home``; links are relative to it."""
    asset = {
        name: (HERE / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "chart.js", "page.js")
    }
    sections = (_result, _curves, _runs, _groups, _sizes, _failures, _provenance)
    made = time.strftime("%Y-%m-%d %H:%M %Z")
    page = Template(asset["page.html"]).substitute(
        title=_text(title),
        kind="grid" if summary.collection.grids else "runs",
        generator=f"gpt {__version__}",
        style=asset["page.css"],
        body="".join(section(summary, home) for section in sections),
        footer=f"made {made} by gpt {__version__}; <code>summary.csv</code> and <code>summary.json</code> beside it",
        data=_script_json(data(summary)),
        script=asset["chart.js"] + asset["page.js"],
    )
    path = home / "report.html"
    write_atomic(path, page)
    return path


def _text(value: object) -> str:
    return html.escape(str(value))


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _link(path: Path, home: Path, words: str) -> str:
    return f'<a href="{_text(quote(os.path.relpath(path, home)))}">{_text(words)}</a>'


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{''.join(parts)}</section>\n"


def _paragraphs(lines: Iterable[str], kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    return "".join(f"<p{mark}>{_text(line)}</p>\n" for line in lines)


def _command(line: str) -> str:
    button = '<button type="button" class="copy" hidden>copy</button>'
    return f'<div class="command"><code>{_text(line)}</code>{button}</div>\n'


def _table(header: list[tuple[str, bool]], rows: list[str], more: str = "") -> str:
    """Names of columns, whether they are figures; rows as HTML."""
    head = "".join(f'<th scope="col"{" class=n" if right else ""}>{_text(name)}</th>' for name, right in header)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table"><table class="wide sortable"{more}>'
        f"<thead><tr>{head}</tr></thead><tbody>\n{''.join(rows)}</tbody></table></div>\n"
    )


def _key_cells(row: Row, keys: list[str]) -> str:
    cells = []
    for key in keys:
        words = brief(row.keys[key])
        number = isinstance(row.keys[key], int | float)
        kind = "n" if number else "long" if len(words) > 30 else ""
        cells.append(f'<td{f" class={kind}" if kind else ""} title="{_text(text(row.keys[key]))}">{_text(words)}</td>')
    return "".join(cells)


def _key_header(rows: list[Row], keys: list[str]) -> list[tuple[str, bool]]:
    return [(key, any(isinstance(row.keys[key], int | float) for row in rows)) for key in keys]


def _result(summary: Summary, home: Path) -> str:
    """What came out: the first thing to read."""
    states = Counter(row.run.state for row in summary.rows)
    tiles = [("runs", str(len(summary.rows)), ", ".join(f"{count} {state}" for state, count in states.most_common()))]
    parts = []
    if summary.best is not None:
        best, group = summary.rows[summary.best], summary.groups[0]
        value, line = shown(summary.metric, best.figures[summary.metric]), command(best.run)
        if group.sd is not None:
            mean, keys = f"{group.mean:.4f} ± {group.sd:.4f}", [key for key in summary.keys if key != "seed"]
            tiles.append((f"best {summary.metric}, mean of {group.n} seeds", mean, label(best, keys)))
            tiles.append(("its best run", value, f"seed={text(best.keys.get('seed'))}"))
        else:
            tiles.append((f"best {summary.metric}", value, label(best, summary.keys)))
        words = "The command of the best run; it goes on with the same run, trainer.resume=never starts afresh:"
        parts = [_paragraphs([words]), _command(line)] if line else []
    if summary.spread:
        tiles.append(("difference worth believing", f"{summary.spread.difference:.4f}", "or more, between any two"))
    flops = sum(row.figures["flops"] or 0 for row in summary.rows)
    seconds = sum(row.figures["seconds"] or 0 for row in summary.rows)
    if seconds:
        tiles.append(("time in training steps", shown("seconds", seconds), f"{flops:.3g} FLOPs in all runs"))
    shown_tiles = "".join(
        f"<div><dt>{_text(a)}</dt><dd>{_text(b)} <small>{_text(c)}</small></dd></div>" for a, b, c in tiles
    )
    return _section("Result", f'<dl class="tiles">{shown_tiles}</dl>\n', *parts, _paragraphs(verdict(summary)))


def _curves(summary: Summary, home: Path) -> str:
    """The frame of the first chart; the script fills it."""
    if not any(len(row.run.columns["step"]) for row in summary.rows):
        return ""
    return _section("Loss curves", (HERE / "curves.html").read_text(encoding="utf-8"))


def _runs(summary: Summary, home: Path) -> str:
    """The table of all runs."""
    figures = figures_of(summary)
    header = [(NAMES.get(name, name), True) for name in figures]
    header[1:1] = [*_key_header(summary.rows, summary.keys), ("state", False)]
    header.append(("run", False))
    best = summary.groups[0].counted if summary.groups else []  # all seeds of the best configuration
    rows = []
    for number, row in enumerate(summary.rows):
        mark = "<b class=mark>best</b> " if number in best else ""
        cells = []
        for name in figures:
            value, lead = row.figures[name], mark if name == summary.metric else ""
            known = "" if value is None else f"{value:.8g}"
            cells.append(f'<td class=n data-v="{known}">{lead}{_text(shown(name, value))}</td>')
        cells[1:1] = [_key_cells(row, summary.keys), f'<td data-v="{row.run.state}">{_state(row.run.state)}</td>']
        link = _link(row.run.path, home, row.run.name) if row.run.path.exists() else _text(row.run.name)
        rows.append(f"<tr data-run={number}>{''.join(cells)}<td>{link}</td></tr>\n")
    note = "Only the keys that differ, the lowest loss first. A click on a row shows or hides its curve."
    return _section("Runs", _paragraphs([note], "note"), _table(header, rows, " id=runs"))


def _state(state: str) -> str:
    return f'<span class="mark {state}" title="{_text(STATES[state])}">{state}</span>'


def _groups(summary: Summary, home: Path) -> str:
    """Configurations over their seeds, each with a strip: its seeds as dots, its mean, what is luck shaded."""
    groups = [group for group in summary.groups if group.n]
    if not summary.spread or not groups:
        return ""
    keys = [key for key in summary.keys if key != "seed"]
    low = min(min(group.values) for group in groups)
    reach = groups[0].mean + 8 * summary.spread.difference  # what is further off lies at the edge
    high = max(groups[0].mean + summary.spread.difference, min(reach, max(max(group.values) for group in groups)))
    header = [*_key_header(summary.rows, keys), ("seeds", True), (f"mean {summary.metric}", True)]
    header += [
        ("standard deviation", True),
        ("standard error", True),
        ("above the best", True),
        ("", False),
        ("beside the best", False),
    ]
    rows = []
    for group in groups:
        row, left = summary.rows[group.runs[0]], len(group.runs) - group.n
        figures = [f"{group.n}" + (f" of {len(group.runs)}" if left else ""), f"{group.mean:.4f}"]
        figures += ["" if x is None else f"{x:.4f}" for x in (group.sd, group.error)]
        figures.append(f"{group.mean - groups[0].mean:.4f}")
        cells = "".join(f"<td class=n>{figure}</td>" for figure in figures)
        strip = _strip(group, (low, high), (groups[0].mean, groups[0].mean + summary.spread.difference))
        verdict_ = f'<td><span class="mark {group.verdict}">{VERDICTS[group.verdict]}</span></td>'
        rows.append(f"<tr>{_key_cells(row, keys)}{cells}<td>{strip}</td>{verdict_}</tr>\n")
    note = (
        f"Runs that differ only in their seed are one row. Dots are seeds, the bar is their mean. The shaded part is "
        f"nearer to the best than {summary.spread.difference:.4f}: that may be luck."
    )
    return _section("Seeds", _paragraphs([note], "note"), _table(header, rows))


def _strip(group: Group, ends: tuple[float, float], luck: tuple[float, float]) -> str:
    width, height = 220, 18
    scale = (width - 12) / max(ends[1] - ends[0], 1e-12)

    def at(value: float) -> float:
        return 6 + max(0.0, min(width - 12.0, (value - ends[0]) * scale))

    dots = "".join(f'<circle cx="{at(value):.1f}" cy="9" r="3.5"/>' for value in group.values)
    return (
        f'<svg class="strip" width="{width}" height="{height}" aria-hidden="true">'
        f'<rect class="luck" x="{at(luck[0]):.1f}" width="{at(luck[1]) - at(luck[0]):.1f}" height="{height}"/>'
        f'{dots}<path d="M{at(group.mean):.1f} 2v14"/></svg>'
    )


def _sizes(summary: Summary, home: Path) -> str:
    """Loss against compute."""
    sizes = summary.sizes
    if not sizes:
        return ""
    rows = []
    for point in sizes.ends:
        row = summary.rows[point.run]
        cells = [
            f"{point.parameters:,}",
            f"{point.flops:.3g}",
            shown("tokens", row.figures["tokens"]),
            f"{point.loss:.4f}",
        ]
        rows.append(
            "<tr>"
            + "".join(f"<td class=n>{cell}</td>" for cell in cells)
            + f"<td>{_text(label(row, summary.keys))}</td></tr>\n"
        )
    header = [
        ("parameters", True),
        ("FLOPs", True),
        ("tokens", True),
        (summary.metric, True),
        ("best run of this size", False),
    ]
    words = [
        "The heavy line is the frontier: the lowest loss that any run had reached with so much compute. "
        "Dots are the best end of each size."
    ]
    if sizes.fit:
        a, b = sizes.fit
        words.append(
            f"Dotted: a fit, loss = {a:.4g} · FLOPs^-{b:.4g}, least squares in logarithms through the last frontier "
            f"point of each of {len(sizes.fitted)} sizes. It has no floor and says nothing outside of them."
        )
    else:
        words.append(
            f"No power law is fitted: that takes three sizes on the frontier, and there are {len(sizes.fitted)}."
        )
    return _section(
        "Model size and compute",
        '<div class="chart" id="compute"></div>\n',
        _paragraphs(words, "note"),
        _table(header, rows),
    )


def _failures(summary: Summary, home: Path) -> str:
    """What did not come through, with the end of its log."""
    bad = [row for row in summary.rows if row.run.state in BAD]
    if not bad:
        return ""
    parts = []
    for number, row in enumerate(bad):
        run = row.run
        lines = next((lines for log in run.logs if (lines := tail(log))), []) if number < TAILS else []
        links = [
            _link(log, home, os.path.relpath(log, run.path.parent if log.is_relative_to(run.path) else home))
            for log in run.logs[:9]
        ]
        code = f", exit code {run.code}" if run.code is not None else ""
        parts.append(
            f"<details{' open' * (number < 3)}><summary>{_state(run.state)} <b>{_text(label(row, summary.keys))}</b> "
            f"<span class=note>{_text(run.name)}{code}; {_text(STATES[run.state])}</span></summary>\n"
            + (f"<pre>{_text(chr(10).join(lines))}</pre>\n" if lines else "")
            + (f"<p class=note>logs: {', '.join(links)}</p>\n" if links else "<p class=note>it left no log</p>\n")
            + _command(command(run))
            + "</details>\n"
        )
    return _section(f"What did not come through ({len(bad)})", *parts)


def _provenance(summary: Summary, home: Path) -> str:
    """The commands, versions and dates behind the page."""
    parts = []
    for grid in summary.collection.grids:
        name = grid.get("name") or grid["folder"].name
        line = " ".join(str(word) for word in grid.get("command") or [])
        parts.append(
            _paragraphs([f"Grid {name}, {len(grid['cells'])} cells; the last command that added to it:"])
            + _command(line)
        )
    about = [row.run.about for row in summary.rows]
    facts = []
    created = sorted(str(each["created"]) for each in about if "created" in each)
    if created:
        facts.append(("runs begun", created[0] if created[0] == created[-1] else f"{created[0]} to {created[-1]}"))
    facts.append(
        (
            "code",
            ", ".join(sorted({str(each["git"])[:12] for each in about if "git" in each})) or "not from a git checkout",
        )
    )
    machines = {_machine(each["machine"]) for each in about if isinstance(each.get("machine"), dict)}
    facts += [("computed on", machine) for machine in sorted(machines)]
    versions: dict[str, set[str]] = {}
    for each in about:
        for package, version in each.get("versions", {}).items():
            versions.setdefault(str(package), set()).add(str(version))
    facts += [(package, ", ".join(sorted(which))) for package, which in versions.items()]
    return _section(
        "How it was made",
        *parts,
        '<dl class="facts">',
        *(f"<dt>{_text(a)}</dt><dd>{_text(b)}</dd>" for a, b in facts),
        "</dl>\n",
    )


def _machine(machine: dict[str, Any]) -> str:
    """Of ``gpt.runs.provenance``: what computes in it."""
    gpus = Counter(str(gpu) for gpu in machine.get("gpus") or [])
    parts = [f"{count} x {gpu}" for gpu, count in gpus.items()]
    return f"{machine.get('host')}: {', '.join([*parts, str(machine.get('cpu'))])}, {machine.get('cores')} cores"


# What the page's script draws: few enough points for hundreds of runs in one file, close where a curve bends.

POINTS = 120_000  # on the page; a run gets its share
MOST, LEAST = 400, 60  # of one curve


def share(runs: int) -> int:
    """Points of each curve of so many runs."""
    return max(LEAST, min(MOST, POINTS // max(runs, 1)))


def thinned(run: Run, points: int) -> dict[str, Any]:
    """The training and validation curves of a run, as the page's script reads them.

    A point of the training stands for all records since the one before it, and has their mean; of the validation it is
    one of its records. Half of the points are even in the step, half even in its logarithm.
    """
    columns = run.columns
    step, tokens, seconds = columns["step"], columns["tokens"], np.nancumsum(columns["seconds"])
    timed = np.isfinite(columns["seconds"]).any()
    ratio = tokens[-1] / step[-1] if len(step) and step[-1] and np.isfinite(tokens[-1]) else 0.0
    even = bool(ratio) and bool(np.allclose(tokens, ratio * step))

    def curve(which: NDArray[np.int64], loss: Array) -> dict[str, Any] | None:
        if not np.isfinite(loss).any():
            return None
        data: dict[str, Any] = {"step": step[which].astype(int).tolist(), "loss": [_short(y) for y in loss]}
        if timed:
            data["seconds"] = [_short(s) for s in seconds[which]]
        if not even:
            data["tokens"] = [_short(t) for t in np.nan_to_num(tokens[which])]
        return data

    every = kept(len(step), points)
    checked = np.flatnonzero(np.isfinite(columns["val/loss"]))
    checked = checked[kept(len(checked), points)]
    return {
        "train": curve(every, _means(columns["train/loss"], every)),
        "val": curve(checked, columns["val/loss"][checked]),
        "tokens_per_step": ratio,
        "each": round(len(step) / len(every)) if len(every) else 1,
    }


def kept(count: int, points: int) -> NDArray[np.int64]:
    """Which of so many records stay, in order: always the first and the last.

    Example:
        >>> kept(1000, 10).tolist()
        [0, 5, 31, 177, 250, 500, 749, 999]
    """
    if count <= points:
        return np.arange(count)
    linear = np.linspace(0, count - 1, points // 2)
    logarithmic = np.geomspace(1, count, points // 2) - 1
    return np.unique(np.concatenate([linear, logarithmic]).round().astype(np.int64))


def _means(values: Array, ends: NDArray[np.int64]) -> Array:
    """Of the finite values after one end up to the next; NaN of none."""
    if len(ends) == len(values):
        return values
    starts = np.concatenate([[0], ends[:-1] + 1])
    finite = np.isfinite(values)
    count = np.add.reduceat(finite.astype(np.float64), starts)
    total = np.add.reduceat(np.where(finite, values, 0.0), starts)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _short(value: float) -> float | None:
    """Five digits, as many as a picture shows; JSON has no NaN."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def data(summary: Summary) -> dict[str, Any]:
    """What the script draws: curves, and for each run the number of its value of every key."""
    names = [*summary.keys, *(["state"] if len({row.run.state for row in summary.rows}) > 1 else [])]
    values = {name: [row.run.state if name == "state" else row.keys[name] for row in summary.rows] for name in names}
    keys, numbers = [], {}
    for name, column in values.items():
        words, ordered = _values(column)
        numbers[name] = [words.index(text(value)) for value in column]
        short = [brief(float(word)) if ordered and "." in word else word for word in words]
        distinct = len(set(short)) == len(words)
        keys.append({"name": name, "values": short if distinct else words, "ordered": ordered})
    points = share(len(summary.rows))
    runs = []
    for i, row in enumerate(summary.rows):
        curve = thinned(row.run, points)
        about = {
            "name": row.run.name,
            "v": [numbers[name][i] for name in names],
            "parameters": row.figures["parameters"],
        }
        has_curves = bool(curve["train"] or curve["val"])
        runs.append({**about, "curves": has_curves, "flops_per_token": row.run.flops_per_token(), **curve})
    checked = [len(run["val"]["step"]) for run in runs if run["val"]]
    loss = "train" if not checked else "both" if max(checked) < 4 and len(runs) <= 12 else "val"
    return {"metric": summary.metric, "loss": loss, "keys": keys, "runs": runs, "sizes": _sizes_data(summary)}


def _values(column: list[Any]) -> tuple[list[str], bool]:
    """The different values of a key in words, and whether they are numbers, which come in their order."""
    different = {text(value): value for value in column}
    if all(isinstance(value, int | float) for value in different.values() if value is not None):
        return sorted(different, key=lambda word: different[word] or 0), True
    return sorted(different), False


def _sizes_data(summary: Summary) -> dict[str, Any] | None:
    sizes = summary.sizes
    if not sizes:
        return None

    def coordinates(points: list[Point]) -> list[list[float]]:
        return [[float(f"{p.flops:.5g}"), float(f"{p.loss:.5g}"), p.parameters] for p in points]

    every = kept(len(sizes.frontier), MOST)
    frontier = coordinates([sizes.frontier[i] for i in every])
    return {
        "sizes": sizes.sizes,
        "fit": sizes.fit,
        "frontier": frontier,
        "ends": coordinates(sizes.ends),
        "fitted": coordinates(sizes.fitted),
    }
