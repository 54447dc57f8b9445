"""Cells of a grid as they are composed, and a script that plays them in milliseconds."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path

from conftest import SMALL, Ran, configured

from gpt.config.schema import Config
from gpt.runs.grid import Cell

Run = Callable[..., Ran]

# What "python -m launchers.sweep.run_cell FILE" leaves behind. By seed:
# 13 fails, 14 leaves a trace of nothing, 15 never ends.
PLAYER = f"""#!{sys.executable}
import json, signal, sys, time
from pathlib import Path
cell = json.loads(Path(sys.argv[3]).read_text())
run, seed = Path(cell["run_dir"]), cell["config"]["seed"]
run.mkdir(parents=True, exist_ok=True)
(run / "job.json").write_text("{{}}")
def stop(number, frame):
    (run / "result.json").write_text(json.dumps({{"status": "stopped", "step": 2, "val/loss": 4.5}}))
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
for step in range(1, 4):
    record = {{"step": step, "train/loss": 5.0, "val/loss": 4.0 + seed, "tokens_per_second": 100.0}}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\\n")
if seed == 13:
    print("the reason")
    sys.exit(3)
while seed == 15:
    time.sleep(0.01)
(run / "result.json").write_text(json.dumps({{"status": "done", "step": 12, "val/loss": 4.0 + seed}}))
"""


@functools.cache
def composed_once(more: tuple[str, ...]) -> Config:
    return configured([*SMALL, "data=stdlib", "grid.slots=4", *more])


def cells(*seeds: int, more: tuple[str, ...] = ()) -> list[Cell]:
    """Cells as they are composed."""
    return [
        Cell(
            [f"seed={seed}", *more],
            dataclasses.replace(composed_once(more), seed=seed),
            Path("outputs", f"run_{seed}"),
            [f"seed={seed}"],
        )
        for seed in seeds
    ]
