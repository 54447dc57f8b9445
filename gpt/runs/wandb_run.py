"""A run at Weights & Biases: its id, name and labels, its folders on disk, how to reach the server. W&B itself is not
imported here.

wandb_id                          the id, for the run's whole life
wandb/offline-run-DATE-ID/        what a start recorded offline; a later start takes it over
wandb/run-DATE-ID/                the same of a start that was online
"""

from __future__ import annotations

import netrc
import os
import secrets
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gpt.config.derived import plain, world_size
from gpt.config.schema import Config, EngineKind, Parallel, Wandb, WandbMode, degrees_name
from gpt.runs.provenance import git_revision
from gpt.runs.run_dir import Job
from gpt.utils.files import short
from gpt.utils.machine import versions


def mode_now(settings: Wandb) -> Any:
    """How to reach W&B now: ``auto`` is online with a key, unless ``WANDB_MODE`` says otherwise."""
    if settings.mode is not WandbMode.auto:
        return settings.mode.value
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    return "online" if os.environ.get("WANDB_API_KEY") or _key_on_file() else "offline"


def _key_on_file() -> bool:
    try:
        path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
        server = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
        return netrc.netrc(str(path)).authenticators(server or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def is_enabled(config: Config) -> bool:
    """Whether records go to W&B."""
    return config.logger.wandb.enabled and config.logger.wandb.mode is not WandbMode.disabled


def run_id(run_dir: Path) -> str:
    """The run's W&B id: made once, kept in the run directory."""
    path = run_dir / "wandb_id"
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()


def layout(parallel: Parallel) -> str:
    """The degrees above 1, and who shares the model out, in a word, whatever preset they come from.

    Example:
        >>> layout(Parallel(2, 4, 3, 1, 2, 1, False)), layout(Parallel(1, 1, 1, 1, 4, 2, False))
        ('dp2_sharding4_stage3_pp2', 'pp4_virtual2')
    """
    words = ["auto"] if parallel.engine is EngineKind.auto else []
    words.append(degrees_name(parallel))
    words += [f"virtual{parallel.virtual_pp_degree}"] if parallel.virtual_pp_degree > 1 else []
    return "_".join([*words, *(["static"] if parallel.static else [])])


def about(job: Job) -> dict[str, Any]:
    """The run's labels and configuration, as ``wandb.init`` takes them; runs are grouped by what is in ``choices``."""
    config, settings, ranks = job.config, job.config.logger.wandb, world_size(job.config)
    choices = {
        "model": config.model.name,
        "parallel": layout(config.parallel),
        "precision": config.precision.dtype.value,
        "ranks": ranks,
        "data": config.data.kind.value,
    }
    return {
        "name": settings.name or job.run_dir.name,
        "group": settings.group,
        "job_type": config.task.value,
        "tags": [
            *(f"{choices[key]}" for key in ("model", "precision", "parallel")),
            f"{ranks} rank{'s' if ranks > 1 else ''}",
            *config.tags,
        ],
        "notes": config.notes or None,
        "config": {
            **plain(config),
            "choices": choices,
            "command": shlex.join(job.command),
            "versions": versions(),
            "git": git_revision(),
            "data_fingerprint": job.data.fingerprint,
        },
    }


def segments(run_dir: Path, run: str = "*") -> list[Path]:
    """The folders of a run's starts, the oldest first; of all runs in ``run_dir``, evaluations too, without an id."""
    folders = (path for path in (run_dir / "wandb").glob(f"*run-*-{run}") if path.is_dir() and not path.is_symlink())
    return sorted(folders, key=lambda path: path.name.removeprefix("offline-"))


def sent(segment: Path) -> bool:
    """Whether ``wandb sync`` has left its mark."""
    return any(segment.glob("*.wandb.synced"))


def link(folder: Path, run_dir: Path, run: str) -> None:
    """Show a run's segments in a folder that other runs share, so that ``wandb leet`` has them side by side.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"*run-*-{run}"):
        old.unlink(missing_ok=True)
    for segment in segments(run_dir, run):
        (folder / segment.name).symlink_to(os.path.relpath(segment.resolve(), folder.resolve()))


def remove(superseded: Iterable[Path]) -> None:
    """Delete segments whose rows a later one has as well."""
    for segment in superseded:
        shutil.rmtree(segment, ignore_errors=True)


def commands(folder: Path) -> list[tuple[str, str]]:
    """What to do with what was recorded offline, for a person: commands and why; none if the server has it all.

    Args:
        folder: ``wandb/`` of a run, or of a grid, where the runs of all cells are linked.
    """
    waiting = [path for path in folder.glob("offline-run-*") if path.is_dir() and not sent(path)]
    if not waiting:
        return []
    shown = shlex.quote(str(short(folder)))
    return [
        (f"wandb leet {shown}", "its curves, in the terminal"),
        (f"wandb sync {shown}", f"send {len(waiting)} offline run(s) to W&B"),
    ]
