"""Bytes per rank under every way to share a model out, as Paddle's CPU allocator counts them, beside the theory.

    python scripts/bench_memory.py

Each row is a job of its own: every rank builds the engine and makes three steps on random tokens. 'between steps' is
what stays (weights, master weights, optimizer state), 'peak' the most at any moment, building included. The theory is
``gpt.plan.memory``. The table goes into docs/parallel.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt import cli, plan  # noqa: E402
from gpt.config import Config, global_batch_size, plain, typed, world_size  # noqa: E402
from gpt.files import replace_section  # noqa: E402
from launchers import host, places  # noqa: E402

MODEL = [
    "model=tiny", "model.hidden=512", "model.layers=8", "model.heads=8", "model.vocab=8192", "model.positions=256",
    "data=tokens", "data.path=none", "trainer.micro_batch_size=2", "trainer.global_batch_size=16",
    "cluster.device=cpu",
]  # fmt: skip
STAGED, BY_POSITION = "parallel.sharding_stage", "parallel.sequence_parallel=true"
LAYOUTS = [
    ["parallel=single"], ["parallel=single", "model.recompute=core_attn"], ["parallel=single", "model.recompute=full"],
    ["parallel=dp2"],
    *(["parallel=sharding2", f"{STAGED}={stage}"] for stage in (1, 2, 3)),
    *(["parallel=single", "parallel.sharding_degree=4", f"{STAGED}={stage}"] for stage in (1, 2, 3)),
    ["parallel=single", "parallel.sharding_degree=4", f"{STAGED}=3", "model.recompute=full"],
    ["parallel=mp2"], ["parallel=mp2", BY_POSITION], ["parallel=single", "parallel.mp_degree=4"],
    ["parallel=single", "parallel.mp_degree=4", BY_POSITION],
    ["parallel=pp2"], ["parallel=pp4"], ["parallel=pp4", "model.recompute=full"],
    ["parallel=mp2_pp2"], ["parallel=mp2_pp2", BY_POSITION], ["parallel=dp2_mp2_pp2"], ["parallel=sharding2_mp2_pp2"],
]  # fmt: skip
STEPS = 3


class RandomSamples:
    """Stands in for ``gpt.data.samples.Samples``."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def batch(self, first: int, count: int) -> Any:
        """Samples ``first`` to ``first + count`` of random tokens."""
        import numpy as np

        from gpt.data.samples import Batch

        shape = (count, self.config.data.seq_len + 1)
        tokens = np.random.default_rng(first).integers(0, self.config.model.vocab, shape)
        return Batch(tokens[:, :-1], tokens[:, 1:], np.ones((count, shape[1] - 1), np.float32))


def serve(config: Config, answer: Path) -> None:
    """In a rank: train, and write what the allocator counted."""
    from paddle.base import core

    from gpt.engine import Engine
    from gpt.topology import Topology
    from gpt.worker import leave

    engine = Engine(config, Topology.connect(config))
    samples: Any = RandomSamples(config)
    for number in range(1, STEPS + 1):
        engine.step(number, samples)
    answer.write_text(
        json.dumps(
            {
                "between": core.host_memory_stat_current_value("Allocated", 0),
                "peak": core.host_memory_stat_peak_value("Allocated", 0),
                "parameters": sum(int(p.size) for p in engine.parameters.values()),
            }
        )
    )
    leave(0)


def measure(config: Config, folder: Path) -> list[dict[str, int]]:
    """What each rank of a job counted."""
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOG_minloglevel": "2"}
    ranks = []
    for rank, place in enumerate(places.here(world_size(config), gpu=False)):
        command = [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            "--serve",
            json.dumps(plain(config)),
            str(folder / f"{rank}.json"),
        ]
        variables = place.variables() if world_size(config) > 1 else {}
        env = {**os.environ, **one_thread, **host.mkl_settings(), **variables}
        with open(folder / f"{rank}.log", "wb") as log:
            ranks.append(subprocess.Popen(command, env=env, stderr=log))
    codes = [rank.wait() for rank in ranks]
    for number in (number for number, code in enumerate(codes) if code):
        sys.exit(f"rank {number} of {config.parallel}:\n{(folder / f'{number}.log').read_text()}")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(len(ranks))]


def row(layout: list[str], folder: Path) -> str:
    """One line of the table."""
    config = cli.job([*MODEL, *layout])
    found = measure(config, folder)
    need = plan.memory(config)
    between, peak = max(rank["between"] for rank in found), max(rank["peak"] for rank in found)
    stays = need.weights + need.optimizer
    names = " ".join(part.removeprefix("parallel=").removeprefix("parallel.") for part in layout)
    figures = [between, stays, peak, need.total]
    return f"| {names} | {world_size(config)} | " + " | ".join(f"{figure / 2**20:,.0f}" for figure in figures) + " |"


def main() -> None:
    """Measure all layouts and write the table."""
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "parallel.md")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(typed(json.loads(arguments.serve[0])), Path(arguments.serve[1]))
    config = cli.job(MODEL)
    m = config.model
    lines = [
        f"`python scripts/bench_memory.py`: {plan.parameters(config):,} parameters ({m.layers} layers, {m.hidden} ",
        f"wide, vocabulary {m.vocab:,}), {global_batch_size(config)} samples of {config.data.seq_len} tokens in micro ",
        f"batches of {config.trainer.micro_batch_size}, fp32, dropout {m.dropout}; MiB on the fullest rank.",
        "",
        "| parallel | ranks | between steps | theory: weights + optimizer | peak | theory: all |",
        "|---|---|---|---|---|---|",
    ]
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(row(layout, Path(folder)))
        print(lines[-1], flush=True)
        replace_section(arguments.output, "memory", "\n".join(lines))


if __name__ == "__main__":
    main()
