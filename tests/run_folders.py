"""Folders of runs and grids as trainings leave them, without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import configured

from gpt.config.derived import plain

BASE = plain(configured(["model=tiny", "trainer.max_steps=50"]))


def run_folder(folder: Path, keys: dict[str, Any], losses: list[float], **more: Any) -> Path:
    """A run's folder as a training leaves it.

    Args:
        folder: is made.
        keys: dotted, that differ from a tiny run of 50 steps.
        losses: one per step; every tenth and the last are also validated, 0.1 higher.
        more: ``result`` (None: none), ``overrides``, ``torn``.
    """
    (folder / "logs").mkdir(parents=True)
    config = json.loads(json.dumps(BASE))
    for key, value in keys.items():
        *sections, leaf = key.split(".")
        node = config
        for section in sections:
            node = node[section]
        node[leaf] = value
    overrides = more.get("overrides", [f"{key}={value}" for key, value in keys.items()])
    command = ["python", "-m", "gpt.main", "model=tiny", "trainer.max_steps=50", *overrides]
    (folder / "job.json").write_text(json.dumps({"config": config, "command": command, "git": "0" * 40}))
    records = [
        {"step": k, "tokens": 2048 * k, "train/loss": loss, "seconds": 0.5, "tokens_per_second": 4096.0}
        | ({"val/loss": loss + 0.1} if k % 10 == 0 or k == len(losses) else {})
        for k, loss in enumerate(losses, 1)
    ]
    text = "".join(json.dumps(record) + "\n" for record in records) + more.get("torn", "")
    (folder / "metrics.jsonl").write_text(text)
    result = more.get("result", {"status": "done", "step": 50, "tokens": 2048 * len(losses)})
    if result:
        figures = {"train/loss": losses[-1], "val/loss": losses[-1] + 0.1} if losses else {}
        (folder / "result.json").write_text(json.dumps({**figures, **result}))
    return folder


def curve(end: float) -> list[float]:
    return [end + 5 / k for k in range(1, 50)] + [end]


def grid_of(folder: Path, cells: dict[str, list[str]], events: list[dict[str, Any]]) -> Path:
    """A grid's folder in ``folder/grids/g`` whose runs are in ``folder``."""
    grid = folder / "grids" / "g"
    (grid / "cells").mkdir(parents=True)
    known = {name: {"overrides": o, "differs": o, "run_dir": f"../../{name}"} for name, o in cells.items()}
    command = ["python", "-m", "gpt.main", "-m", "model=tiny"]
    (grid / "grid.json").write_text(json.dumps({"name": "g", "command": command, "cells": known}))
    (grid / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return grid
