"""Train one small model under every preset and write how far the losses are from those of one process.

    python scripts/parity.py            # writes docs/parity.md; a few minutes on two cores

Same seed, data and global batch, fp32, no dropout, clipping on; every preset runs as a user would run it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
JOB = [
    "model=tiny", "model.hidden=64", "model.layers=8", "model.positions=64", "trainer.global_batch_size=16",
    "trainer.micro_batch_size=2", "trainer.max_steps=20", "trainer.eval_every=20", "trainer.eval_batches=2",
    "trainer.save_every=0", "optimizer.clip_norm=0.3", "schedule.warmup_steps=4", "schedule.decay_steps=20",
    "optimizer.lr=1e-3", "cluster.device=cpu", "cluster.threads=1", "generate.max_new_tokens=1",
]  # fmt: skip
BY_POSITION = "parallel.sequence_parallel=true"
LAYOUTS = [
    ["single"], ["dp2"], ["mp2"], ["mp2", BY_POSITION], ["pp2"], ["pp4"], ["pp4", "parallel.virtual_pp_degree=2"],
    ["sharding2"], ["sharding2_stage2"], ["sharding2_stage3"], ["sharding2_stage3", "model.recompute=full"],
    ["mp2_pp2"], ["mp2_pp2", BY_POSITION], ["dp2_mp2"], ["sharding2_stage2", "parallel.dp_degree=2"],
    ["sharding2_stage3", "parallel.mp_degree=2", BY_POSITION], ["dp2_mp2_pp2"], ["sharding2_mp2_pp2"], ["dp8"],
    ["single", "parallel.sharding_degree=8", "parallel.sharding_stage=2"],
]  # fmt: skip
Record = dict[str, float]


def train(overrides: list[str], run_dir: Path) -> list[Record]:
    """Records of one run."""
    command = [sys.executable, "-m", "gpt.main", *JOB, *overrides, f"hydra.run.dir={run_dir}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def distance(key: str, one: list[Record], other: list[Record]) -> float:
    """Largest relative difference over all steps that have the key."""
    pairs = [(a[key], b[key]) for a, b in zip(one, other, strict=True) if key in a]
    return max(abs(a - b) / abs(a) for a, b in pairs)


def main() -> None:
    """Run all presets, write the table; exit code 1 if one is not equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "parity.md")
    arguments = parser.parse_args()
    rows, worst = [], 0.0
    expected: list[Record] = []
    known: dict[tuple[float, ...], str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (preset, *more) in enumerate(LAYOUTS):
            records = train([f"parallel={preset}", *more], Path(folder) / str(number))
            expected = expected or records
            figures = [distance(key, expected, records) for key in ("train/loss", "grad_norm", "val/loss")]
            last = f"{records[-1]['train/loss']:.6f}"
            name = " ".join([preset, *(override.removeprefix("parallel.") for override in more)])
            losses = tuple(record["train/loss"] for record in records)
            same = known.setdefault(losses, name)
            figures_shown = " | ".join(f"{figure:.1e}" for figure in figures)
            rows.append(f"| {name} | {last} | {figures_shown} | {same if same != name else ''} |")
            print(rows[-1], flush=True)
            worst = max(worst, figures[0], figures[2])
            arguments.output.write_text("\n".join([*HEAD, *rows, ""]), encoding="utf-8")
    sys.exit(worst > 1e-5)


HEAD = [
    "# Parity",
    "",
    "Made by `python scripts/parity.py`: a small model (8 layers, 64 wide) for 20 steps on CPU ranks, fp32, no",
    "dropout, clipping on, the same global batch of 16. Largest relative difference from one process over all steps.",
    "`tests/test_parity.py` holds the losses to 1e-5, and pipelines of different depth to one another bit for bit.",
    "",
    "| preset | last loss | training loss | gradient norm | validation loss | training loss bit-equal to |",
    "|---|---|---|---|---|---|",
]


if __name__ == "__main__":
    main()
