"""The recipe of CONTRIBUTING.md makes a task that runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def test_the_task_of_the_recipe_runs_and_its_problems_are_told(tmp_path: Path) -> None:
    for folder in ("gpt", "conf", "launchers"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (recipe,) = re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S)
    subprocess.run(["git", "apply", "-"], input=recipe, text=True, check=True, cwd=tmp_path)
    (tmp_path / "text").write_text("one two three")

    def words(*overrides: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "gpt.main", "task=words", *overrides],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            check=False,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    code, shown = words("words.path=text")
    assert (code, shown.splitlines()) == (0, ["== counted ==", "words  3"])
    assert words() == (2, _refused("words.path has no value: give a text with words.path=..."))
    assert words("words.path=none") == (2, _refused("words.path=none: no such file"))


def _refused(problem: str) -> str:
    return f"1 problem, nothing was started:\n  - {problem}\n"
