"""Train one small model under every preset and write how far the losses are from those of one process.

    python scripts/parity.py            # writes docs/parity.md; a few minutes on two cores
    python scripts/parity.py --reshard  # its second table: one run that changes its topology every four steps
    python scripts/parity.py --pairs    # a sentence in docs/parallel.md; a quarter of an hour

Same seed, data and global batch, fp32, no dropout, clipping on; every preset runs as a user would run it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt import cli  # noqa: E402
from gpt.utils.files import replace_section  # noqa: E402
from scripts import compatibility  # noqa: E402

JOB = [
    "model=tiny", "model.hidden=64", "model.layers=8", "model.positions=64", "trainer.global_batch_size=16",
    "trainer.micro_batch_size=2", "trainer.max_steps=20", "trainer.eval_every=20", "trainer.eval_batches=2",
    "trainer.save_every=0", "optimizer.clip_norm=0.3", "schedule.warmup_steps=4", "schedule.decay_steps=20",
    "optimizer.lr=1e-3", "cluster.device=cpu", "cluster.threads=1", "generate.max_new_tokens=1",
]  # fmt: skip
BY_POSITION, STATIC = "parallel.sequence_parallel=true", "parallel.static=true"
PAIRS = ["model.layers=12", "trainer.global_batch_size=24", "trainer.micro_batch_size=1", "trainer.max_steps=5"]
LAYOUTS = [
    ["single"], ["dp2"], ["mp2"], ["mp2", BY_POSITION], ["pp2"], ["pp4"], ["pp4", "parallel.virtual_pp_degree=2"],
    ["sharding2"], ["sharding2_stage2"], ["sharding2_stage3"], ["sharding2_stage3", "model.recompute=full"],
    ["mp2_pp2"], ["mp2_pp2", BY_POSITION], ["dp2_mp2"], ["sharding2_stage2", "parallel.dp_degree=2"],
    ["sharding2_stage3", "parallel.mp_degree=2", BY_POSITION], ["dp2_mp2_pp2"], ["sharding2_mp2_pp2"], ["dp8"],
    ["single", "parallel.sharding_degree=8", "parallel.sharding_stage=2"],
    ["auto_dp2"], ["auto_dp2", STATIC], ["auto_mp2"], ["auto_mp2", STATIC], ["auto_dp2_mp2"], ["auto_dp8"],
    ["auto_pp2"], ["auto_pp2", "parallel.pp_degree=4"], ["auto_pp2", "parallel.sharding_degree=2"],
    ["auto_pp2", "parallel.mp_degree=2"], ["dp2_mp2_pp2", "parallel.engine=auto"],
    ["auto_sharding2"], ["auto_sharding2", STATIC], ["auto_sharding2", "parallel.sharding_stage=2"],
    ["auto_sharding2", "parallel.sharding_stage=2", "parallel.mp_degree=2"],
]  # fmt: skip
CHAIN = [
    ["dp2_mp2_pp2"], ["sharding2_stage3"], ["pp4", "parallel.virtual_pp_degree=2"], ["single"], ["mp2", BY_POSITION],
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


def pairs() -> Iterator[list[str]]:
    """One process, and every two ways that docs/parallel.md says go together."""
    base = cli.compose_job([*JOB, *PAIRS])
    yield ["parallel=single"]
    names = list(compatibility.WAYS)
    for i, row in enumerate(names):
        for column in names[: i + 1]:
            if compatibility.together(base, row, column) == []:
                wanted = {**compatibility.WAYS[row], **compatibility.WAYS[column]}
                recompute = wanted.pop("recompute", None)
                chosen = [f"parallel.{key}={value}" for key, value in wanted.items()]
                yield ["parallel=single", *chosen, *([f"model.recompute={recompute.value}"] if recompute else [])]


def compare(layouts: Iterable[list[str]], common: list[str]) -> Iterator[tuple[str, list[Record], list[float]]]:
    """Of each layout its name, its records, and how far loss, norm and validation loss are from the first's."""
    expected: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, layout in enumerate(layouts):
            records = train([*common, *layout], Path(folder) / str(number))
            expected = expected or records
            name = " ".join(word.removeprefix("parallel=").removeprefix("parallel.") for word in layout)
            yield name, records, [distance(key, expected, records) for key in ("train/loss", "grad_norm", "val/loss")]


def write_presets() -> float:
    """docs/parity.md; returns the largest difference of a loss."""
    rows, worst = [], 0.0
    known: dict[tuple[float, ...], str] = {}
    for name, records, figures in compare([[f"parallel={preset}", *more] for preset, *more in LAYOUTS], []):
        same = known.setdefault(tuple(record["train/loss"] for record in records), name)
        shown = " | ".join(f"{figure:.1e}" for figure in figures)
        last = f"{records[-1]['train/loss']:.6f}"
        rows.append(f"| {name} | {last} | {shown} | {same if same != name else ''} |")
        print(rows[-1], flush=True)
        worst = max(worst, figures[0], figures[2])
        replace_section(ROOT / "docs" / "parity.md", "presets", "\n".join([*HEAD, *rows]))
    return worst


def write_pairs() -> float:
    """A sentence in docs/parallel.md; returns the largest difference of a loss."""
    worst, count = 0.0, 0
    for name, _, figures in compare(pairs(), PAIRS):
        print(name, *(f"{figure:.1e}" for figure in figures), flush=True)
        worst, count = max(worst, figures[0], figures[2]), count + 1
    text = (
        f"All {count - 1} combinations that the table says go together were run for five steps on CPU ranks (`python "
        f"scripts/parity.py --pairs`): the largest relative difference of a loss from one process is {worst:.1e}."
    )
    replace_section(ROOT / "docs" / "parallel.md", "pairs", text)
    return worst


def write_reshard() -> float:
    """The second table of docs/parity.md; returns the largest difference of a loss."""
    rows, worst, steps = [], 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        expected = train(["parallel=single"], Path(folder) / "single")
        for preset, *more in CHAIN:
            legs = [f"parallel={preset}", *more, f"trainer.max_steps={steps + 4}"]
            records = train(legs, Path(folder) / "chain")[steps:]
            far = distance("train/loss", expected[steps : steps + 4], records)
            name = " ".join([preset, *(override.removeprefix("parallel.") for override in more)])
            rows.append(f"| {steps + 1} to {steps + 4} | {name} | {records[-1]['train/loss']:.6f} | {far:.1e} |")
            print(rows[-1], flush=True)
            steps, worst = steps + 4, max(worst, far)
    text = "\n".join(["| steps | under | last loss | largest difference |", "|---|---|---|---|", *rows])
    replace_section(ROOT / "docs" / "parity.md", "reshard", text)
    return worst


def main() -> None:
    """Run, write; exit code 1 if a layout is not equal to one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", action="store_true", help="every two ways together instead of the presets")
    parser.add_argument(
        "--reshard", action="store_true", help="one run that goes on under another preset every 4 steps"
    )
    arguments = parser.parse_args()
    write = write_pairs if arguments.pairs else write_reshard if arguments.reshard else write_presets
    sys.exit(write() > 1e-5)


HEAD = [
    "| preset | last loss | training loss | gradient norm | validation loss | training loss bit-equal to |",
    "|---|---|---|---|---|---|",
]


if __name__ == "__main__":
    main()
