"""Writes the table of what goes with what into docs/parallel.md, from the rules that check every command.

python scripts/support.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt import cli  # noqa: E402
from gpt.utils.files import replace_section  # noqa: E402
from scripts import compatibility  # noqa: E402

PAGE = ROOT / "docs" / "parallel.md"
# A shape and a batch that all degrees of the table divide.
BASE = ["model=tiny", "model.layers=12", "model.heads=4", "trainer.micro_batch_size=1", "trainer.global_batch_size=24"]


def main() -> None:
    """Render."""
    replace_section(PAGE, "support", compatibility.table(cli.compose_job(BASE)))


if __name__ == "__main__":
    main()
