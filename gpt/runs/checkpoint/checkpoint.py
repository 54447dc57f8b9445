"""Checkpoints that are whole or not there, free of topology, checked before they are used.

    checkpoints/step_00000020/
        model.safetensors        parameters by logical name, always float32 (the master weights where there are any)
        optimizer.safetensors    <parameter>.<slot>
        index.json               of every array the whole shape, and which slices are in which file
        state.json               step, tokens, loss scale, configuration, data, versions
        tokenizer.json           if the data has one; or tokenizer.model
        manifest.json            size and SHA-256 of each file above

Of several ranks each writes the slices that it answers for: ``model-00003-of-00008.safetensors`` is rank 3's, and ranks
that would repeat others have no file. Any number of ranks reads by slice what any other number wrote.

The ranks write into one folder under a temporary name (``saver``), flush it, and the first renames it; so a folder
that has its name is complete, and one whose manifest does not hold has been damaged since.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gpt.data.tokenizer import Encoder, open_encoder
from gpt.parallel.topology import Topology
from gpt.runs.checkpoint import shard_files
from gpt.runs.checkpoint.shard_files import CheckpointReader, Index
from gpt.runs.run_dir import checkpoint_steps
from gpt.utils.errors import UserError

FORMAT = 2
KINDS = ("model", "optimizer")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found sound."""

    path: Path

    @cached_property
    def state(self) -> dict[str, Any]:
        """What is not an array."""
        state: dict[str, Any] = json.loads((self.path / "state.json").read_text(encoding="utf-8"))
        return state

    @cached_property
    def _index(self) -> dict[str, Index]:
        index: dict[str, Index] = json.loads((self.path / "index.json").read_text(encoding="utf-8"))
        return index

    def model(self) -> CheckpointReader:
        """Parameters by logical name, float32."""
        return CheckpointReader(self.path, self._index["model"])

    def optimizer(self) -> CheckpointReader:
        """Optimizer slots by ``<parameter>.<slot>``."""
        return CheckpointReader(self.path, self._index["optimizer"])

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer that the model was trained with."""
        return next(iter(self.path.glob("tokenizer.*")), None)

    def encoder(self) -> Encoder:
        """The same at work.

        Raises:
            UserError: there is none.
        """
        if self.tokenizer is None:
            raise UserError(f"{self.path} has no tokenizer, so it has no text: train with data.tokenizer=...")
        return open_encoder(self.tokenizer)


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def file_of(kind: str, rank: int, ranks: int) -> str:
    """The file with a rank's slices of the ``model`` or the ``optimizer``.

    Example:
        >>> file_of("model", 3, 8)
        'model-00003-of-00008.safetensors'
    """
    return f"{kind}-{rank:05d}-of-{ranks:05d}.safetensors" if ranks > 1 else f"{kind}.safetensors"


def verify(path: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint folder, or None: every file has the size and hash of the manifest.

    Args:
        path: of the folder.
        share: which share of the files to read, the others are only looked at.
        shares: how many there are.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, this version reads {FORMAT}"
        files = sorted(manifest["files"].items(), key=lambda item: -item[1]["bytes"])
        for name, known in files:
            file = path / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != known["bytes"]:
                return f"{name} has {file.stat().st_size:,} bytes instead of {known['bytes']:,}"
        for name, known in files[share::shares]:
            if shard_files.digest_file(path / name).sha256 != known["sha256"]:
                return f"{name} has changed (its SHA-256 differs)"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it cannot be read ({error})"
    return None


def latest_valid(run_dir: Path, warn: Callable[[str], None], topology: Topology | None = None) -> Checkpoint | None:
    """The newest sound checkpoint of a run, found by looking, or None.

    Args:
        run_dir: of the run.
        warn: told of each damaged one that is passed over.
        topology: of this rank if all ranks ask at once: they share out the reading, and all find the same.
    """
    rank, ranks = (topology.rank, ranks_of(topology)) if topology else (0, 1)
    for step in reversed(_together(topology, checkpoint_steps(run_dir))[0]):
        path = folder_of(run_dir, step)
        problems = _together(topology, verify(path, rank, ranks))
        problem = next((p for p in problems if p), None)
        if problem is None:
            return Checkpoint(path)
        warn(f"checkpoint {path.name} is damaged and passed over: {problem}")
    return None


def ranks_of(topology: Topology) -> int:
    """How many there are."""
    return topology.replicas * topology.parallel.mp_degree * topology.parallel.pp_degree


def _together(topology: Topology | None, mine: Any) -> list[Any]:
    """What each rank says."""
    if topology is None or topology.hcg is None:
        return [mine]
    import paddle.distributed as dist

    said: list[Any] = []
    dist.all_gather_object(said, mine)
    return said


def load_or_fail(source: Path, warn: Callable[[str], None], topology: Topology | None = None) -> Checkpoint:
    """The newest sound checkpoint of a run, or the one that ``source`` is.

    Raises:
        UserError: there is none.
    """
    if (source / "state.json").is_file():
        rank, ranks = (topology.rank, ranks_of(topology)) if topology else (0, 1)
        problem = next((p for p in _together(topology, verify(source, rank, ranks)) if p), None)
        if problem:
            raise UserError(f"checkpoint {source} is damaged: {problem}")
        return Checkpoint(source)
    found = latest_valid(source, warn, topology)
    if found is None:
        raise UserError(f"{source}: no sound checkpoint; train first (the same command without task=)")
    return found
