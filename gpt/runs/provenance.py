"""Where a run comes from: commit and edits of the code, versions, machine, every start. Nothing here fails a run.

starts.jsonl      a line per start of a training: time, command, from which step, commit, edits, versions, machine
code.diff         what was edited since the commit; code-2.diff and so on if a later start found other edits
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from gpt.utils.files import append_json, write_atomic
from gpt.utils.machine import machine, versions

HERE = Path(__file__).resolve().parents[2]
SOURCES = ("gpt", "launchers", "conf", "scripts")  # new files in them are part of the code
MAX_DIFF = 4 << 20  # bytes; more is not an edit but a generated file
GIT_SECONDS = 10.0
NEW_FILES = ("ls-files", "-z", "--others", "--exclude-standard", "--", *SOURCES)


def _git(here: Path, *arguments: str, index: Path | None = None) -> bytes:
    """What git says.

    Raises:
        OSError: there is no git.
        subprocess.SubprocessError: it fails, or takes long.
    """
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", **({"GIT_INDEX_FILE": str(index)} if index else {})}
    command = ["git", "-c", "core.quotePath=true", *arguments]
    return subprocess.run(command, cwd=here, env=env, capture_output=True, timeout=GIT_SECONDS, check=True).stdout


def git_revision(here: Path = HERE) -> str | None:
    """The commit of the checkout the code runs from, '+' if it was edited; None outside one."""
    if not (here / ".git").exists():
        return None
    try:
        sha = _git(here, "rev-parse", "HEAD").decode().strip()
        edited = _git(here, "status", "--porcelain", "-uno") or _git(here, *NEW_FILES)
    except (OSError, subprocess.SubprocessError):
        return None
    return sha + ("+" if edited else "")


def code_diff(here: Path = HERE) -> bytes | None:
    """The edits since the commit, as ``git apply`` takes them, with new files in ``SOURCES``; None if git cannot tell.

    New files are entered into a copy of the index, so that the checkout is not touched.
    """
    if not (here / ".git").exists():
        return None
    try:
        with tempfile.TemporaryDirectory() as folder:
            index = Path(folder) / "index"
            shutil.copyfile(here / _git(here, "rev-parse", "--git-path", "index").decode().strip(), index)
            if new := _git(here, *NEW_FILES):
                _git(here, "add", "--intent-to-add", "--", *new.decode().split("\0")[:-1], index=index)
            plain = ("--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/")
            return _git(here, "diff", *plain, "HEAD", index=index)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def keep_code(run_dir: Path, here: Path = HERE) -> str | None:
    """Put the edits of the code into the run's folder; returns the file's name, None if there is none to keep.

    A start that finds the edits of an earlier one gives the name of that file.
    """
    diff = code_diff(here)
    if not diff or len(diff) > MAX_DIFF:
        return f"left out: {len(diff):,} bytes" if diff else None
    number = 1
    try:
        text = diff.decode("utf-8", errors="surrogateescape")
        while (path := run_dir / ("code.diff" if number == 1 else f"code-{number}.diff")).exists():
            if path.read_bytes() == diff:
                return path.name
            number += 1
        write_atomic(path, text)
    except (OSError, UnicodeError) as error:
        return f"left out: {error}"
    return path.name


def note_start(run_dir: Path, command: Sequence[str], from_step: int, ranks: int) -> None:
    """Append this start to ``starts.jsonl``."""
    about = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": list(command),
        "argv": sys.argv,
        "folder": os.getcwd(),  # paths of the command are relative to it
        "from_step": from_step,
        "ranks": ranks,
        "git": git_revision(),
        "diff": keep_code(run_dir),
        "versions": versions(),
        "machine": machine(),
    }
    with contextlib.suppress(OSError):
        append_json(run_dir / "starts.jsonl", about)
