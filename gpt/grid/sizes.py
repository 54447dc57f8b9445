"""Loss against compute over model sizes: the lowest loss that any run had reached for so many FLOPs, and a fit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gpt.grid.gather import Run

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
    there = np.isfinite(tokens) & np.isfinite(loss) & (tokens > 0)
    return [Point(cost * t, y, size, number) for t, y in zip(tokens[there].tolist(), loss[there].tolist(), strict=True)]


def _power_law(points: list[Point]) -> tuple[float, float] | None:
    if len(points) < MINIMUM or min(point.loss for point in points) <= 0:
        return None
    x, y = np.log([p.flops for p in points]), np.log([p.loss for p in points])
    slope = float(np.sum((x - x.mean()) * (y - y.mean())) / np.sum((x - x.mean()) ** 2))
    return math.exp(float(y.mean()) - slope * float(x.mean())), -slope
