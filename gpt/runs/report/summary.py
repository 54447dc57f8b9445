"""The table of a grid: the keys that differ, the figures, the groups over seeds, the best cell and its command."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt.plan.summary import duration
from gpt.runs.report import statistics
from gpt.runs.report.collect import Run, RunCollection
from gpt.runs.report.statistics import Group, Spread
from gpt.utils.files import write_atomic, write_json

FIGURES = (
    "step", "tokens", "train/loss", "val/loss", "tokens_per_second", "mfu", "seconds", "parameters", "flops",
)  # fmt: skip
# What conf/ computes from another key: left out of the table where it says nothing more and no command named it.
DERIVED = {"model.ffn": "model.hidden", "data.seq_len": "model.positions", "data.vocab": "model.vocab"}
PRESET = "model.name"  # conf/model sets keys of these sections
OF_PRESET = ("model.", "trainer.", "optimizer.", "schedule.", "data.")


@dataclass(frozen=True)
class Row:
    """A run in the table: the values of the keys that differ, and its ``FIGURES``."""

    run: Run
    keys: dict[str, Any]
    figures: dict[str, float | None]


@dataclass(frozen=True)
class Summary:
    """What there is to say of many runs.

    Attributes:
        collection: where it is from.
        metric: the loss that is compared: of the validation, or of the training if nothing was ever validated.
        keys: that differ.
        rows: the best first.
        groups: of rows that differ in their seed only, the best first; runs that do not count are in no group.
        spread: None where no group has two seeds.
        best: number of the best row: of the best group its best; None where nothing can be compared.
        sizes: None unless models differ in size.
    """

    collection: RunCollection
    metric: str
    keys: list[str]
    rows: list[Row]
    groups: list[Group]
    spread: Spread | None
    best: int | None
    sizes: Sizes | None


def summarise(collection: RunCollection) -> Summary:
    """Everything but the curves."""
    validated = any(np.isfinite(run.columns["val/loss"]).any() or run.result.get("val/loss") for run in collection.runs)
    metric = "val/loss" if validated else "train/loss"
    keys = differing(collection.runs)
    rows = [Row(run, {key: run.config.get(key) for key in keys}, _figures(run)) for run in collection.runs]
    rows.sort(key=lambda row: _order(row, metric))
    groups = _groups(rows, metric)
    spread = statistics.compare_seeds(groups)
    best = groups[0].counted[groups[0].values.index(min(groups[0].values))] if groups and groups[0].n else None
    return Summary(collection, metric, keys, rows, groups, spread, best, sizes([row.run for row in rows], metric))


def _order(row: Row, metric: str) -> tuple[Any, ...]:
    value = row.figures[metric]
    usable = value is not None and math.isfinite(value)
    return (not usable, value if usable else 0.0, row.run.state, row.run.name)


def _figures(run: Run) -> dict[str, float | None]:
    """In the units of metrics.jsonl; ``seconds`` are those of training steps, ``flops`` those of all tokens."""
    typical = {
        name: float(np.nanmedian(column)) if np.isfinite(column := run.columns[name]).any() else None
        for name in ("tokens_per_second", "mfu")
    }
    tokens, cost = run.last("tokens"), run.flops_per_token()
    seconds = run.columns["seconds"]
    return {
        **{name: run.last(name) for name in ("step", "tokens", "train/loss", "val/loss")},
        "tokens_per_second": run.result.get("tokens_per_second", typical["tokens_per_second"]),
        "mfu": typical["mfu"],
        "seconds": float(np.nansum(seconds)) if np.isfinite(seconds).any() else None,
        "parameters": run.parameters() or run.result.get("parameters"),
        "flops": tokens * cost if tokens is not None and cost else None,
    }


def differing(runs: list[Run]) -> list[str]:
    """The keys that are not the same in all runs; a run that does not know a key, as one of an earlier version, agrees.

    Those that a command named come first. One that follows from another is left out unless a command named it.
    """
    values: dict[str, list[str | None]] = {}
    for number, run in enumerate(runs):
        for key, value in run.config.items():
            values.setdefault(key, [None] * len(runs))[number] = json.dumps(value, sort_keys=True)
    differ = {key: column for key, column in values.items() if len(set(column) - {None}) > 1}
    named = set().union(*(run.named for run in runs))
    if "model" in named:
        named.add(PRESET)

    def follows(key: str) -> bool:
        sources = [DERIVED.get(key), PRESET if key.startswith(OF_PRESET) else None]
        return key not in named and any(
            source in differ and source != key and _function_of(differ[source], differ[key]) for source in sources
        )

    kept = [key for key in differ if not follows(key)]
    return sorted(kept, key=lambda key: (key == "seed", key not in named, list(differ).index(key)))


def _function_of(source: list[str | None], target: list[str | None]) -> bool:
    """Whether every value of the source goes with one value of the target."""
    return len(set(zip(source, target, strict=True))) == len(set(source))


def _groups(rows: list[Row], metric: str) -> list[Group]:
    """Rows that differ in nothing but the seed. Runs that are done count; if none is, those that came furthest."""
    done = any(row.run.state == "done" for row in rows)
    furthest = max((row.figures["step"] or 0 for row in rows), default=0)
    groups: dict[str, Group] = {}
    for number, row in enumerate(rows):
        if row.run.state in ("new", "submitted", "lost"):
            continue
        rest = {key: value for key, value in row.keys.items() if key != "seed"}
        group = groups.setdefault(json.dumps(rest, sort_keys=True), Group([]))
        group.runs.append(number)
        value, seed = row.figures[metric], row.keys.get("seed")
        counts = (
            value is not None
            and math.isfinite(value)
            and (row.run.state == "done" if done else row.figures["step"] == furthest)
        )
        if counts and seed not in group.seeds:  # the same configuration and seed twice is one run
            group.values.append(float(value or 0.0))
            group.counted.append(number)
            group.seeds.append(seed)
    return list(groups.values())


def command(run: Run) -> str:
    """What runs it again, as a single run. The same command goes on with the same run, and says so if it is done."""
    head, words = ["python", "-m", "gpt.main"], run.command
    if words[:3] == head:
        kept = [w for w in words[3:] if w not in ("-m", "--multirun") and not w.startswith(("grid.", "report."))]
        words = [*head, *kept]
    return shlex.join(words)


def label(row: Row, keys: list[str]) -> str:
    """The row in the words of a command; its name where nothing differs."""
    return " ".join(f"{key}={brief(row.keys[key])}" for key in keys if row.keys[key] is not None) or row.run.name


def text(value: Any) -> str:
    """A value of the configuration, as in a command.

    Example:
        >>> text(1e6), text(3e-4), text(True), text([0.9, 0.95])
        ('1e+06', '0.0003', 'true', '[0.9, 0.95]')
    """
    if isinstance(value, float) and float(format(value, "g")) == value:
        return format(value, "g")
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def brief(value: Any) -> str:
    """The same for people, who do not read sixteen digits.

    Example:
        >>> brief(0.0031622776601683794), brief(512)
        ('0.003162', '512')
    """
    return format(value, ".4g") if isinstance(value, float) else text(value)


def shown(name: str, value: float | None) -> str:
    """A figure for people.

    Example:
        >>> shown("val/loss", 3.25), shown("tokens", 163840), shown("flops", 1.23e12), shown("mfu", 0.415)
        ('3.2500', '163,840', '1.23e+12', '41.5%')
    """
    if value is None or not math.isfinite(value):
        return ""
    if name == "seconds":
        return duration(value) if value else "0 s"
    if name.endswith("/loss") and abs(value) >= 1e4:
        return f"{value:.3g}"
    form = {"train/loss": ".4f", "val/loss": ".4f", "mfu": ".1%", "flops": ".3g"}.get(name, ",.0f")
    return format(value, form)


def figures_of(summary: Summary) -> list[str]:
    """The columns that have a figure, the compared one first."""
    figures = [name for name in FIGURES if any(row.figures[name] is not None for row in summary.rows)]
    return sorted(figures, key=lambda name: (name != summary.metric, name != "train/loss", FIGURES.index(name)))


def verdict(summary: Summary) -> list[str]:
    """What can be believed, in sentences."""
    compared = [group for group in summary.groups if group.n]
    if not compared:
        return [f"Nothing can be compared: no run has a {summary.metric}."]
    keys = [key for key in summary.keys if key != "seed"]
    done = any(row.run.state == "done" for row in summary.rows)
    lead = [] if done else ["No run is done; those that came furthest are compared."]
    if summary.spread is None:
        remedy = " Add seed=1,2,3 to the command of the grid." if done else ""
        return [*lead, f"No configuration has two seeds: how much of a difference is luck cannot be said.{remedy}"]
    s, same = summary.spread, [group for group in compared if group.verdict == "same"]
    luck = f"Standard deviation over seeds {s.sd:.4f}, {s.freedom} degrees of freedom."
    if len(compared) == 1:
        one = f"Smallest difference worth believing: {s.pair:.4f} from another with {s.n} seeds (Student's t)."
        return [*lead, f"{one} {luck}"]
    lines = [
        *lead,
        f"Smallest difference worth believing: {s.difference:.4f} between any two of {s.groups} "
        f"with {s.n} seeds each (Tukey, 95 %), {s.pair:.4f} between two that were chosen beforehand (Student's t). "
        f"{luck}",
    ]
    names = ", ".join(label(summary.rows[group.runs[0]], keys) for group in same[:5])
    more = f" and {len(same) - 5} more" if len(same) > 5 else ""
    return [
        *lines,
        f"Not distinguishable from the best: {names}{more}." if same else "The best is better than all others.",
    ]


def plain(summary: Summary, home: Path) -> dict[str, Any]:
    """``summary.json``; run folders relative to ``home``. Its fields are described in docs/report.md."""
    rows, spread = summary.rows, summary.spread
    keys = [key for key in summary.keys if key != "seed"]
    groups = [
        {
            "keys": {key: rows[group.runs[0]].keys[key] for key in keys},
            "runs": [rows[i].run.name for i in group.runs],
            "seeds": group.seeds,
            "n": group.n,
            "mean": group.mean if group.n else None,
            "sd": group.sd,
            "standard_error": group.error,
            "verdict": group.verdict,
        }
        for group in summary.groups
    ]
    return {
        "metric": summary.metric,
        "keys": summary.keys,
        "best": None if summary.best is None else _best(summary.rows[summary.best], summary.metric),
        "difference": dataclasses.asdict(spread) if spread else None,
        "groups": groups,
        "sizes": dataclasses.asdict(summary.sizes) if summary.sizes else None,
        "runs": [
            {
                "name": row.run.name,
                "state": row.run.state,
                "keys": row.keys,
                **row.figures,
                "folder": os.path.relpath(row.run.path, home),
                "command": command(row.run),
            }
            for row in rows
        ],
    }


def _best(row: Row, metric: str) -> dict[str, Any]:
    return {"name": row.run.name, metric: row.figures[metric], "keys": row.keys, "command": command(row.run)}


def write(summary: Summary, home: Path) -> None:
    """Write ``summary.json`` and ``summary.csv``, whole or not at all."""
    write_json(home / "summary.json", plain(summary, home))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["name", "state", *summary.keys, *FIGURES, "folder"])
    for row in summary.rows:
        keys = [text(row.keys[key]) for key in summary.keys]
        figures = ["" if (value := row.figures[name]) is None else value for name in FIGURES]
        writer.writerow([row.run.name, row.run.state, *keys, *figures, os.path.relpath(row.run.path, home)])
    write_atomic(home / "summary.csv", table.getvalue())


# Loss against compute over model sizes: the lowest loss that any run had reached for so many FLOPs, and a fit.

MINIMUM = 3  # sizes on the frontier that a fit takes


@dataclass(frozen=True)
class Point:
    """A model of ``parameters`` had this loss after so many FLOPs; ``run`` is a number."""

    flops: float
    loss: float
    parameters: int
    run: int


@dataclass(frozen=True)
class Sizes:
    """Of a sweep over model sizes.

    Attributes:
        sizes: parameters, ascending.
        frontier: what is reached for so much compute and not for less (as in figure 2 of Hoffmann et al., 2022).
        ends: the best end of each size.
        fit: (a, b) of loss = a FLOPs^-b through the last frontier point of each size, least squares in logarithms;
            None with fewer than three sizes on the frontier. A power law without an offset, as in Kaplan et al. (2020).
        fitted: those points.
    """

    sizes: list[int]
    frontier: list[Point]
    ends: list[Point]
    fit: tuple[float, float] | None
    fitted: list[Point]


def sizes(runs: list[Run], metric: str) -> Sizes | None:
    """The picture of loss against compute; None unless two sizes have a curve.

    Args:
        runs: numbered as they are in the list.
        metric: the column that is compared.
    """
    points = [point for number, run in enumerate(runs) for point in _points(run, number, metric)]
    known = sorted({point.parameters for point in points})
    if len(known) < 2:
        return None
    points.sort(key=lambda point: (point.flops, point.loss))
    frontier: list[Point] = []
    for point in points:
        if not frontier or point.loss < frontier[-1].loss:
            frontier.append(point)
    last = {point.run: point for point in points}
    ends = [min((p for p in last.values() if p.parameters == size), key=lambda p: p.loss) for size in known]
    fitted = list({point.parameters: point for point in frontier}.values())
    return Sizes(known, frontier, ends, _power_law(fitted), fitted)


def _points(run: Run, number: int, metric: str) -> list[Point]:
    size, cost = run.parameters(), run.flops_per_token()
    if size is None or cost is None:
        return []
    tokens, loss = run.columns["tokens"], run.columns[metric]
    valid = np.isfinite(tokens) & np.isfinite(loss) & (tokens > 0)
    return [Point(cost * t, y, size, number) for t, y in zip(tokens[valid].tolist(), loss[valid].tolist(), strict=True)]


def _power_law(points: list[Point]) -> tuple[float, float] | None:
    if len(points) < MINIMUM or min(point.loss for point in points) <= 0:
        return None
    x, y = np.log([p.flops for p in points]), np.log([p.loss for p in points])
    slope = float(np.sum((x - x.mean()) * (y - y.mean())) / np.sum((x - x.mean()) ** 2))
    return math.exp(float(y.mean()) - slope * float(x.mean())), -slope
