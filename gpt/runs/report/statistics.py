"""How much of a difference between two configurations is luck: spread over seeds, and what is beyond it.

All groups of runs that differ in nothing but their seed are taken to spread alike, so that few seeds of each are
enough. Two means differ more than luck explains if they are further apart than

    HSD = q(95 %; k, nu) s sqrt((1/n1 + 1/n2) / 2)

(Tukey, 1953, for equal n; Kramer, 1956, for others: "Extension of multiple range tests to group means with unequal
numbers of replications"). q is a quantile of the studentized range of k means, s the pooled standard deviation with
nu degrees of freedom. It holds for all pairs of the grid together, so also for the best one, which was chosen because
it came out best; with k = 2 it is Student's t: q = sqrt(2) t.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SHARE = 0.95


@dataclass
class Group:
    """Runs that differ only in their seed.

    Attributes:
        runs: their numbers.
        values: the figure compared, of those that count, one per seed.
        seeds: of these.
        counted: their numbers.
        verdict: best, same (not distinguishable from it), worse, or unknown.
    """

    runs: list[int]
    values: list[float] = field(default_factory=list)
    seeds: list[Any] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)
    verdict: str = "unknown"

    @property
    def n(self) -> int:
        """Seeds that count."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """NaN of nothing."""
        return float(np.mean(self.values)) if self.values else math.nan

    @property
    def sd(self) -> float | None:
        """Standard deviation over seeds, n - 1 in the denominator; None of fewer than two."""
        return float(np.std(self.values, ddof=1)) if self.n > 1 else None

    @property
    def error(self) -> float | None:
        """Standard error of the mean."""
        return None if self.sd is None else self.sd / math.sqrt(self.n)


@dataclass(frozen=True)
class Spread:
    """What is luck.

    Attributes:
        sd: pooled standard deviation over seeds.
        freedom: its degrees of freedom.
        n: seeds of a group, as most of those with several have.
        groups: that are compared.
        difference: smallest one worth believing between any two groups of ``n`` seeds.
        pair: the same for two groups that were chosen before anybody saw a result: t(97.5 %; nu) s sqrt(2 / n).
    """

    sd: float
    freedom: int
    n: int
    groups: int
    difference: float
    pair: float


def compare_seeds(groups: list[Group]) -> Spread | None:
    """Order groups by their mean and give each its verdict; None if no group has two seeds.

    The spread is that of the better half. A learning rate that is too high spreads its seeds many times further and
    would hide everything; and since mean and variance of a normal sample are independent, choosing by the mean does
    not make the variance too small. A group with more spread of its own is judged by that.
    """
    groups.sort(key=lambda group: (math.isnan(group.mean), group.mean))
    compared = [group for group in groups if group.n]
    if compared:
        compared[0].verdict = "best"
    half = compared[: max(2, -(-len(compared) // 2))]
    if not any(group.n > 1 for group in half):
        half = compared
    freedom = sum(group.n - 1 for group in half)
    if not freedom:
        return None
    variance = sum((group.n - 1) * (group.sd or 0.0) ** 2 for group in half) / freedom
    k = max(2, len(compared))
    q, best = studentized_range(k, freedom), compared[0]
    for group in compared[1:]:
        own = max(variance, (group.sd or 0.0) ** 2)
        limit = q * math.sqrt((variance / best.n + own / group.n) / 2)
        group.verdict = "worse" if group.mean - best.mean > limit else "same"
    counts = [group.n for group in compared if group.n > 1]
    n = max(set(counts), key=lambda count: (counts.count(count), count))
    scale = math.sqrt(variance / n)
    return Spread(math.sqrt(variance), freedom, n, len(compared), q * scale, studentized_range(2, freedom) * scale)


@functools.lru_cache(maxsize=64)
def studentized_range(k: int, freedom: int, share: float = SHARE) -> float:
    """Quantile of the range of k standard normal means over an independent estimate of their standard deviation.

    P(q) = integral over s of f(s) R(q s), with R(w) = k integral of phi(z) (Phi(z) - Phi(z - w))^(k - 1), and f the
    density of chi / sqrt(nu) (Harter, 1960, "Tables of range and studentized range").

    Args:
        k: means.
        freedom: degrees of freedom nu of the estimate.
        share: probability of a smaller value.

    Example:
        >>> round(studentized_range(3, 10), 2)
        3.88
    """
    z = np.linspace(-8.0, 8.0, 641)
    w = np.concatenate([np.linspace(0, 16, 321), [1e9]])
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    inner = _normal(z)[None, :] - _normal(z[None, :] - w[:, None])
    within = k * np.sum(density * inner ** (k - 1), axis=1) * (z[1] - z[0])
    u = np.linspace(-14.0, 3.0, 4001)  # ln s: small s matter with few degrees of freedom
    log_f = math.log(2) + freedom / 2 * math.log(freedom / 2) - math.lgamma(freedom / 2)
    weight = np.exp(log_f + freedom * u - freedom / 2 * np.exp(2 * u))

    def below(q: float) -> float:
        return float(np.sum(weight * np.interp(q * np.exp(u), w, within)) * (u[1] - u[0]))

    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < share else (low, middle)
    return (low + high) / 2


def _normal(x: Any) -> Any:
    """Distribution function of the standard normal, of which numpy has none."""
    return np.vectorize(lambda value: 0.5 * math.erfc(-value / math.sqrt(2)))(x)
