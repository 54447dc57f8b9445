"""Render the compatibility table of docs/parallel.md from the rules that check every command.

python scripts/compatibility.py
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt import cli  # noqa: E402
from gpt.config.rules import rule_problems  # noqa: E402
from gpt.config.schema import Config, Recompute  # noqa: E402
from gpt.utils.files import replace_section  # noqa: E402

PAGE = ROOT / "docs" / "parallel.md"
# A shape and a batch that all degrees of the table divide.
BASE = ["model=tiny", "model.layers=12", "model.heads=4", "trainer.micro_batch_size=1", "trainer.global_batch_size=24"]

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
    """Return the problems of some of ``WAYS`` together; None if they exclude one another.

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
    """Return a Markdown table with a row and a column per way, and the reasons of what is refused below it."""
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


def main() -> None:
    """Render the table."""
    replace_section(PAGE, "support", table(cli.compose_job(BASE)))


if __name__ == "__main__":
    main()
