"""Checkpoints that are whole or not there, saved in the background, checked before they are used.

    checkpoints/step_00000020/
        model.safetensors        parameters by logical name, always float32 (the master weights where there are any)
        optimizer.safetensors    <parameter>.<slot>
        state.json               step, tokens, scaler, configuration, data, versions
        tokenizer.json           if the data has one; or tokenizer.model
        manifest.json            size and SHA-256 of each file above

A folder is written under a temporary name, flushed, and renamed; so one that has its name is complete, and one
whose manifest does not hold has been damaged since.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.config import UserError
from gpt.data.tokens import Array
from gpt.files import atomic_directory, remove_directory, remove_leftovers
from gpt.runs import checkpoint_steps

FORMAT = 1
Arrays = dict[str, Array]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found sound."""

    path: Path
    state: dict[str, Any]

    def model(self) -> Arrays:
        """Parameters by logical name, float32."""
        return _read(self.path / "model.safetensors")

    def optimizer(self) -> Arrays:
        """Optimizer slots by ``<parameter>.<slot>``."""
        return _read(self.path / "optimizer.safetensors")

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer that the model was trained with."""
        return next(iter(self.path.glob("tokenizer.*")), None)


def _read(path: Path) -> Arrays:
    from safetensors.numpy import load_file

    arrays: Arrays = load_file(path)
    return arrays


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None: every file has the size and hash of the manifest."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, this version reads {FORMAT}"
        for name, facts in manifest["files"].items():
            file = path / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"]:
                return f"{name} has {file.stat().st_size:,} bytes instead of {facts['bytes']:,}"
            if _sha256(file) != facts["sha256"]:
                return f"{name} has changed (its SHA-256 differs)"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json cannot be read ({error})"
    return None


def newest(run_dir: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest sound checkpoint of a run, found by looking, or None.

    Args:
        run_dir: of the run.
        warn: told of each damaged one that is passed over.
    """
    for step in reversed(checkpoint_steps(run_dir)):
        path = folder_of(run_dir, step)
        problem = damage(path)
        if problem is None:
            return Checkpoint(path, json.loads((path / "state.json").read_text(encoding="utf-8")))
        warn(f"checkpoint {path.name} is damaged and passed over: {problem}")
    return None


def require(run_dir: Path, warn: Callable[[str], None]) -> Checkpoint:
    """``newest``, or an error.

    Raises:
        UserError: the run has no sound checkpoint.
    """
    found = newest(run_dir, warn)
    if found is None:
        raise UserError(f"{run_dir}: no sound checkpoint; train first (the same command without task=)")
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write(path: Path, model: Arrays, optimizer: Arrays, state: dict[str, Any], tokenizer: Path | None) -> None:
    """Write one checkpoint, atomically.

    Raises:
        OSError: the disk is full or gone; nothing of the checkpoint is left, the others are untouched.
    """
    from safetensors.numpy import save_file

    metadata = {"format": "gpt", "step": str(state["step"]), "config": json.dumps(state["config"])}
    with atomic_directory(path) as fresh:
        save_file(model, fresh / "model.safetensors", metadata)
        save_file(optimizer, fresh / "optimizer.safetensors", metadata)
        (fresh / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        if tokenizer:
            shutil.copyfile(tokenizer, fresh / f"tokenizer{tokenizer.suffix}")
        files = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(fresh.iterdir())}
        manifest = {"format": FORMAT, "step": state["step"], "files": files}
        (fresh / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if path.exists():  # only a damaged one can be here: a sound one would have been resumed from
            remove_directory(path)


class Saver:
    """Writes checkpoints on a thread of its own, one at a time, and keeps the newest few.

    Args:
        run_dir: of the run.
        keep: how many to keep; older ones go once a newer one is published.
        say: told of failures and deletions.
    """

    def __init__(self, run_dir: Path, keep: int, say: Callable[[str], None]) -> None:
        self.run_dir = run_dir
        self.keep = keep
        self.say = say
        self.saved_step: int | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        remove_leftovers(run_dir / "checkpoints")

    def submit(
        self, step: int, model: Arrays, optimizer: Arrays, state: dict[str, Any], tokenizer: Path | None
    ) -> None:
        """Start writing; the arrays must be copies that nobody changes. Waits only for an earlier save.

        Args:
            step: of the training.
            model: see ``Checkpoint.model``.
            optimizer: see ``Checkpoint.optimizer``.
            state: what else is needed to go on.
            tokenizer: file to put beside the weights.
        """
        self.wait()

        def work() -> None:
            try:
                write(folder_of(self.run_dir, step), model, optimizer, state, tokenizer)
                self.saved_step = step
                self._retire()
            except Exception as error:  # the thread must never die silently
                self._error = error
                self.say(f"WARNING: checkpoint {step} could not be written ({error}); earlier checkpoints are intact")

        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()

    def wait(self) -> Exception | None:
        """Wait until the last save is over; what went wrong with it, or None."""
        if self._thread:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def _retire(self) -> None:
        for step in checkpoint_steps(self.run_dir)[: -self.keep]:
            remove_directory(folder_of(self.run_dir, step))
