"""What a run keeps of its origin is enough to run it again, and keeping it never fails a run."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from gpt.runs import provenance
from scripts import reproduce


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    here = tmp_path / "checkout"
    (here / "gpt").mkdir(parents=True)
    (here / "gpt" / "a.py").write_text("one = 1\n")
    (here / "gpt" / "gone.py").write_text("gone\n")
    (here / ".gitignore").write_text("outputs/\n")
    git(here, "init", "-q")
    git(here, "add", ".")
    git(here, "commit", "-qm", "first")
    return here


def edit(here: Path) -> None:
    (here / "gpt" / "a.py").write_text("one = 'ein Ünikat'\n")
    (here / "gpt" / "new file.py").write_text("new = True\n")
    (here / "gpt" / "picture.png").write_bytes(bytes(range(256)))
    (here / "gpt" / "gone.py").unlink()
    (here / "secret.txt").write_text("not code\n")  # new, and not among the sources


def test_commit_and_diff_give_the_code_of_the_run_back(checkout: Path, tmp_path: Path) -> None:
    git(checkout, "config", "diff.noprefix", "true")  # a user's settings must not spoil the patch
    edit(checkout)
    git(checkout, "add", "gpt/a.py")  # staged or not
    before = git(checkout, "status", "--porcelain")
    assert provenance.keep_code(tmp_path, checkout) == "code.diff"
    assert git(checkout, "status", "--porcelain") == before  # the checkout and its index are as they were
    revision = provenance.git_revision(checkout)
    assert revision is not None
    assert revision.endswith("+")

    again = tmp_path / "again"
    git(tmp_path, "clone", "-q", str(checkout), str(again))
    git(again, "checkout", "-q", revision.removesuffix("+"))
    git(again, "apply", str(tmp_path / "code.diff"))
    ours, theirs = ({p.name: p.read_bytes() for p in (here / "gpt").iterdir()} for here in (checkout, again))
    assert ours == theirs
    assert not (again / "secret.txt").exists()


def test_a_clean_checkout_leaves_no_diff(checkout: Path, tmp_path: Path) -> None:
    assert provenance.keep_code(tmp_path, checkout) is None
    assert provenance.git_revision(checkout) == git(checkout, "rev-parse", "HEAD").strip()
    assert not list(tmp_path.glob("code*"))


def test_a_new_file_alone_is_an_edit(checkout: Path) -> None:
    (checkout / "gpt" / "b.py").write_text("two = 2\n")
    assert str(provenance.git_revision(checkout)).endswith("+")


def test_each_state_of_the_code_is_kept_once(checkout: Path, tmp_path: Path) -> None:
    names = []
    for text in ("1\n", "2\n", "1\n", "2\n"):
        (checkout / "gpt" / "a.py").write_text(text)
        names.append(provenance.keep_code(tmp_path, checkout))
    assert names == ["code.diff", "code-2.diff", "code.diff", "code-2.diff"]


def test_a_diff_that_is_no_edit_is_left_out(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "MAX_DIFF", 10)
    edit(checkout)
    assert str(provenance.keep_code(tmp_path, checkout)).startswith("left out: ")
    assert not list(tmp_path.glob("code*"))


@pytest.mark.parametrize("harm", ["no checkout", "no git", "slow git", "broken repository", "no folder"])
def test_nothing_here_fails_a_run(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    edit(checkout)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    if harm == "no checkout":
        shutil.rmtree(checkout / ".git")
    if harm == "no git":
        monkeypatch.setenv("PATH", "")
    if harm == "slow git":
        monkeypatch.setattr(provenance, "GIT_SECONDS", 0.0)
    if harm == "broken repository":
        (checkout / ".git" / "HEAD").write_text("nonsense")
    if harm == "no folder":
        run_dir.rmdir()
    assert str(provenance.keep_code(run_dir, checkout)).startswith("left out" if harm == "no folder" else "None")
    provenance.note_start(run_dir, ["python"], 0, 1)


def test_every_start_is_on_record(tmp_path: Path) -> None:
    provenance.note_start(tmp_path, ["python", "-m", "gpt.main", "seed=1"], 0, 1)
    provenance.note_start(tmp_path, ["python", "-m", "gpt.main", "seed=1"], 20, 2)
    first, second = (json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines())
    assert (first["from_step"], second["from_step"], second["ranks"]) == (0, 20, 2)
    assert first["command"] == ["python", "-m", "gpt.main", "seed=1"]
    assert {"numpy", "paddlepaddle", "wandb", "python", "gpt"} <= set(first["versions"])
    assert first["machine"]["host"]
    assert first["machine"]["cores"] > 0


def test_a_start_is_told_as_commands_that_repeat_it(tmp_path: Path) -> None:
    start = {
        "git": "abc+", "diff": "code-2.diff", "versions": {"gpt": "0.1.0", "python": "3.11.7", "numpy": "2.3.5"},
        "folder": "/data", "command": ["python", "-m", "gpt.main", "prompt=a b"],
    }  # fmt: skip
    told = reproduce.commands(tmp_path, start)
    assert told[:3] == ["git worktree add ../again abc", "cd ../again", f"git apply {tmp_path}/code-2.diff"]
    assert told[3] == "pip install numpy==2.3.5  # Python 3.11.7"
    assert told[-1] == "python -m gpt.main 'prompt=a b' hydra.run.dir=again"
    lost = reproduce.commands(tmp_path, {**start, "diff": "left out: 9 bytes"})
    assert "# its edits are lost (left out: 9 bytes)" in lost
