"""Prints the commands that run a training again, in a checkout of its own, from what its folder keeps.

python scripts/reproduce.py outputs/tiny_single_faf5290b            # of its last start
python scripts/reproduce.py outputs/tiny_single_faf5290b --start 1  # of its first
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any


def commands(run_dir: Path, start: dict[str, Any]) -> list[str]:
    """The lines of shell.

    Args:
        run_dir: of the run.
        start: a line of its ``starts.jsonl``.
    """
    commit, diff = start["git"], start["diff"]
    lines = []
    if commit is None:
        lines.append(f"# not run from a checkout: gpt-runner {start['versions']['gpt']}")
    else:
        lines += ["git worktree add ../again " + commit.removesuffix("+"), "cd ../again"]
    if diff and diff.endswith(".diff"):
        lines.append(f"git apply {shlex.quote(str((run_dir / diff).resolve()))}")
    elif diff:
        lines.append(f"# its edits are lost ({diff})")
    pins = [f"{name}=={version}" for name, version in start["versions"].items() if name not in ("gpt", "python")]
    lines.append(f"pip install {' '.join(pins)}  # Python {start['versions']['python']}")
    lines.append(f"# paths of the command are relative to {start['folder']}")
    lines.append(f"{shlex.join(start['command'])} hydra.run.dir=again")
    return lines


def main() -> None:
    """Print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--start", type=int, default=0, help="1: the first; the last by default")
    arguments = parser.parse_args()
    try:
        lines = (arguments.run / "starts.jsonl").read_text(encoding="utf-8").splitlines()
        start = json.loads(lines[arguments.start - 1])
    except (OSError, IndexError, ValueError) as error:
        sys.exit(f"{arguments.run}: no such start on record ({error})")
    print("\n".join(commands(arguments.run, start)))


if __name__ == "__main__":
    main()
