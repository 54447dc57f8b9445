"""Bytes per rank under every way to share a model out, as Paddle's CPU allocator counts them, beside the plan's.

    python scripts/bench_memory.py                  # all layouts, about ten minutes on two cores
    python scripts/bench_memory.py parallel=pp2     # these overrides only; nothing is written

Each row is a stage of a job of its own: every rank builds the engine and makes two steps on random tokens. 'Between
steps' is what stays (weights, master weights, optimizer state), 'peak' the most at any moment, building included. The
plan's are of ``gpt.plan.memory``. The table goes into docs/plan-validation.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt import cli  # noqa: E402
from gpt.config.derived import global_batch_size, typed, world_size  # noqa: E402
from gpt.config.schema import Config  # noqa: E402
from gpt.plan import flops, memory  # noqa: E402
from gpt.utils.files import replace_section  # noqa: E402
from scripts import rank_jobs  # noqa: E402

MODEL = [
    "model=tiny", "model.hidden=384", "model.layers=8", "model.heads=8", "model.vocab=4096", "model.positions=256",
    "data=tokens", "data.path=none", "trainer.micro_batch_size=1", "trainer.global_batch_size=8",
    "cluster.device=cpu",
]  # fmt: skip
STAGED, BY_POSITION = "parallel.sharding_stage", "parallel.sequence_parallel=true"
KINDS = ["core_attn", "full_attn", "full"]
SHARDING4, MP4 = ["parallel=single", "parallel.sharding_degree=4"], ["parallel=single", "parallel.mp_degree=4"]
OTHER = [
    "model.hidden=256", "model.heads=16", "model.vocab=20000", "model.layers=4", "data.seq_len=512",
    "model.positions=512", "trainer.micro_batch_size=2",
]  # fmt: skip
LAYOUTS = [
    *(["parallel=single", *kind] for kind in ([], *([f"model.recompute={kind}"] for kind in KINDS))),
    ["parallel=single", "model.dropout=0.1", "model.attention_dropout=0.1"],
    ["parallel=single", "model.loss_chunk=128"],
    ["parallel=single", "trainer.micro_batch_size=8"], ["parallel=dp2"], ["parallel=dp8"],
    *([f"parallel=sharding2{name}"] for name in ("", "_stage2", "_stage3")),
    *([*SHARDING4, f"{STAGED}={stage}"] for stage in (1, 2, 3)),
    *(["parallel=sharding2_stage3", f"model.recompute={kind}"] for kind in KINDS),
    ["parallel=mp2"], ["parallel=mp2", BY_POSITION], *(["parallel=mp2", f"model.recompute={kind}"] for kind in KINDS),
    ["parallel=mp2", BY_POSITION, "model.recompute=core_attn"], ["parallel=mp2", BY_POSITION, "model.recompute=full"],
    MP4, [*MP4, BY_POSITION], ["parallel=dp2_mp2"],
    ["parallel=pp2"], *(["parallel=pp2", f"model.recompute={kind}"] for kind in KINDS), ["parallel=pp4"],
    ["parallel=pp4", "parallel.virtual_pp_degree=2"],
    ["parallel=pp4", "parallel.virtual_pp_degree=2", "trainer.global_batch_size=4"],
    ["parallel=mp2_pp2"], ["parallel=mp2_pp2", BY_POSITION, "model.recompute=core_attn"],
    ["parallel=dp2_mp2_pp2"], ["parallel=sharding2_mp2_pp2"],
    *([*layout, *OTHER] for layout in (["parallel=single"], ["parallel=single", "model.recompute=full"],
                                       ["parallel=mp2"], ["parallel=pp2"], ["parallel=sharding2_stage3"])),
]  # fmt: skip
STEPS = 2
HEAD = [
    "| parallel | ranks | stage | between steps | plan | error | peak | plan | error |",
    "|---|---|---|---|---|---|---|---|---|",
]


def serve(config: Config, answer: Path) -> None:
    """In a rank: train, and write what the allocator counted."""
    from paddle.base import core

    from gpt.parallel.topology import Topology
    from gpt.train.trainer import Trainer
    from gpt.worker import exit_process

    engine = Trainer(config, Topology.initialize(config))
    samples: Any = rank_jobs.RandomSamples(config)
    for number in range(1, STEPS + 1):
        engine.step(number, samples)
    answer.write_text(
        json.dumps(
            {
                "stage": engine.topology.stage,
                "between": core.host_memory_stat_current_value("Allocated", 0),
                "peak": core.host_memory_stat_peak_value("Allocated", 0),
            }
        )
    )
    exit_process(0)


def rows(layout: list[str]) -> list[tuple[str, float, float]]:
    """Of every stage its line of the table, and the errors of both predictions."""
    config = cli.compose_job([*MODEL, *layout])
    found = rank_jobs.answers(__file__, config)
    shown = [part for part in layout if part not in OTHER]
    names = " ".join(part.split("=", 1)[1] if part.startswith("parallel=") else part.split(".", 1)[1] for part in shown)
    names += ", other shape" if OTHER[0] in layout else ""
    lines = []
    for stage, need in enumerate(memory.stages(config)):
        here = [rank for rank in found if rank["stage"] == stage]
        between, peak = max(rank["between"] for rank in here), max(rank["peak"] for rank in here)
        errors = need.between / between - 1, need.total / peak - 1
        cells = [names, str(world_size(config)), str(stage), _mib(between), _mib(need.between), f"{errors[0]:+.1%}"]
        cells += [_mib(peak), _mib(need.total), f"{errors[1]:+.1%}"]
        lines.append((f"| {' | '.join(cells)} |", *errors))
        print(lines[-1][0], flush=True)
    return lines


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f}"


def main() -> None:
    """Measure all layouts and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of one job instead of all layouts")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "plan-validation.md")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(typed(json.loads(arguments.serve[0])), Path(arguments.serve[1]))
    if arguments.overrides:
        rows(arguments.overrides)
        return
    found = [row for layout in LAYOUTS for row in rows(layout)]
    config = cli.compose_job(MODEL)
    m = config.model
    text = [
        f"{flops.parameters(config):,} parameters ({m.layers} layers, {m.hidden} wide, vocabulary {m.vocab:,}), "
        f"{global_batch_size(config)} samples of {config.data.seq_len} tokens in micro batches of "
        f"{config.trainer.micro_batch_size}, float32, no dropout, unless a row says otherwise; MiB on the fullest rank "
        "of a stage. *Other shape*: 256 wide, 4 layers, 16 heads, vocabulary 20,000, micro batches of 2 x 512 tokens.",
        "",
        *HEAD,
        *(line for line, *_ in found),
        "",
        f"Of {len(found)} rows the largest error is {max(abs(e) for _, e, _ in found):.1%} between steps and "
        f"{max(abs(e) for *_, e in found):.1%} at the peak; the latter is above 5 % in "
        f"{sum(abs(e) > 0.05 for *_, e in found)} of them.",
    ]
    replace_section(arguments.output, "memory", "\n".join(text))


if __name__ == "__main__":
    main()
