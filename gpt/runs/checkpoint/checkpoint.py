"""Checkpoints: complete or absent, independent of topology, verified before use.

    checkpoints/step_00000020/
        model.safetensors        parameters by logical name, always float32 (the master weights where there are any)
        optimizer.safetensors    <parameter>.<slot>
        index.json               of every array the global shape, and which shards are in which file
        state.json               step, tokens, loss scale, configuration, data, versions
        tokenizer.json           if the data has one; or tokenizer.model
        manifest.json            size and SHA-256 of each file above

Each rank writes its unique shards: ``model-00003-of-00008.safetensors`` is rank 3's, and ranks that would repeat others
have no file. Any number of ranks reads by slice what any other number wrote.

The ranks write into one folder under a temporary name (``saver``) and flush it, and rank 0 renames it; so a folder
with its final name is complete, and one that does not match its manifest has been damaged since.
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
    """A verified checkpoint."""

    path: Path

    @cached_property
    def state(self) -> dict[str, Any]:
        """Everything that is not an array."""
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
        """Open the checkpoint's tokenizer.

        Raises:
            UserError: there is none.
        """
        if self.tokenizer is None:
            raise UserError(f"{self.path} has no tokenizer, so it has no text: train with data.tokenizer=...")
        return open_encoder(self.tokenizer)


def folder_of(run_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint of ``step``."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def file_of(kind: str, rank: int, ranks: int) -> str:
    """Return the name of the file with a rank's shards of the ``model`` or the ``optimizer``.

    Example:
        >>> file_of("model", 3, 8)
        'model-00003-of-00008.safetensors'
    """
    return f"{kind}-{rank:05d}-of-{ranks:05d}.safetensors" if ranks > 1 else f"{kind}.safetensors"


def verify(path: Path, share: int = 0, shares: int = 1) -> str | None:
    """Return the problem of a checkpoint folder, or None if every file has the size and hash of the manifest.

    Args:
        path: of the folder.
        share: the files to hash are split into ``shares``, of which this is the one to read.
        shares: number of ranks that verify together.
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
    """Return the newest valid checkpoint of a run, or None.

    Args:
        run_dir: of the run.
        warn: called with a line for each damaged one that is skipped.
        topology: of this rank, if all ranks call together: they split the reading, and get the same result.
    """
    for step in reversed(_all_gather_object(topology, checkpoint_steps(run_dir))[0]):
        path = folder_of(run_dir, step)
        problem = _verify_together(topology, path)
        if problem is None:
            return Checkpoint(path)
        warn(f"checkpoint {path.name} is damaged and passed over: {problem}")
    return None


def _verify_together(topology: Topology | None, path: Path) -> str | None:
    rank, ranks = (topology.rank, topology.world_size) if topology else (0, 1)
    return next((problem for problem in _all_gather_object(topology, verify(path, rank, ranks)) if problem), None)


def _all_gather_object(topology: Topology | None, own: Any) -> list[Any]:
    if topology is None or topology.hcg is None:
        return [own]
    import paddle.distributed as dist

    objects: list[Any] = []
    dist.all_gather_object(objects, own)
    return objects


def load_or_fail(source: Path, warn: Callable[[str], None], topology: Topology | None = None) -> Checkpoint:
    """Return the newest valid checkpoint of a run, or the one that ``source`` is.

    Raises:
        UserError: there is none.
    """
    if (source / "state.json").is_file():
        if problem := _verify_together(topology, source):
            raise UserError(f"checkpoint {source} is damaged: {problem}")
        return Checkpoint(source)
    checkpoint = latest_valid(source, warn, topology)
    if checkpoint is None:
        raise UserError(f"{source}: no sound checkpoint; train first (the same command without task=)")
    return checkpoint
