"""What goes with what: the rules of ``gpt.config.rules`` asked about every pair of ways to share a model out."""

from __future__ import annotations

import dataclasses
from typing import Any

from gpt.config.rules import rule_problems
from gpt.config.schema import Config, Recompute

# Each with the least degree it can have. Two entries that want different values of a key exclude one another.
WAYS: dict[str, dict[str, Any]] = {
    "dp": {"dp_degree": 2},
    "sharding 1": {"sharding_degree": 2, "sharding_stage": 1},
    "sharding 2": {"sharding_degree": 2, "sharding_stage": 2},
    "sharding 3": {"sharding_degree": 2, "sharding_stage": 3},
    "mp": {"mp_degree": 2, "sequence_parallel": False},
    "mp, sequence parallel": {"mp_degree": 2, "sequence_parallel": True},
    "pp": {"pp_degree": 2, "virtual_pp_degree": 1},
    "virtual pp": {"pp_degree": 3, "virtual_pp_degree": 2},
    "recompute full": {"recompute": Recompute.full},
    "recompute full_attn": {"recompute": Recompute.full_attn},
    "recompute core_attn": {"recompute": Recompute.core_attn},
}


def together(base: Config, *names: str) -> list[str] | None:
    """Problems of some of ``WAYS`` together; None if they exclude one another.

    Args:
        base: a job on one rank whose shape and batch every degree here divides.
        names: of ``WAYS``.
    """
    wanted: dict[str, Any] = {}
    for name in names:
        for key, value in WAYS[name].items():
            if wanted.setdefault(key, value) != value:
                return None
    recompute = wanted.pop("recompute", base.model.recompute)
    model = dataclasses.replace(base.model, recompute=recompute)
    return rule_problems(dataclasses.replace(base, model=model, parallel=dataclasses.replace(base.parallel, **wanted)))


def table(base: Config) -> str:
    """Markdown: a row and a column per way, and below it why what is refused is."""
    reasons: list[str] = []
    columns = list(WAYS)[:-1]
    lines = ["| with | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for number, row in enumerate(WAYS):
        cells = []
        for column in columns[: number + 1]:
            problems = together(base, row, column)
            reasons += [problem for problem in problems or [] if problem not in reasons]
            cells.append("–" if problems is None else " ".join(f"[{reasons.index(p) + 1}]" for p in problems) or "yes")
        cells += [""] * (len(columns) - len(cells))
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))])
