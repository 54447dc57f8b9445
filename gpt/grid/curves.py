"""What the page's script draws: few enough points for hundreds of runs in one file, close where a curve bends."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt.grid.gather import Array, Run
from gpt.grid.sizes import Point
from gpt.grid.summary import Summary, brief, text

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
        found: dict[str, Any] = {"step": step[which].astype(int).tolist(), "loss": [_short(y) for y in loss]}
        if timed:
            found["seconds"] = [_short(s) for s in seconds[which]]
        if not even:
            found["tokens"] = [_short(t) for t in np.nan_to_num(tokens[which])]
        return found

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
        there = bool(curve["train"] or curve["val"])
        runs.append({**about, "curves": there, "flops_per_token": row.run.flops_per_token(), **curve})
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
    found = summary.sizes
    if not found:
        return None

    def brief(points: list[Point]) -> list[list[float]]:
        return [[float(f"{p.flops:.5g}"), float(f"{p.loss:.5g}"), p.parameters] for p in points]

    every = kept(len(found.frontier), MOST)
    frontier = brief([found.frontier[i] for i in every])
    return {
        "sizes": found.sizes,
        "fit": found.fit,
        "frontier": frontier,
        "ends": brief(found.ends),
        "fitted": brief(found.fitted),
    }
