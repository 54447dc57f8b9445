"""Writes the tables and the printed plans of docs/plan.md.

    python scripts/plan_tables.py

Devices are those of conf/device; the predecessor's configurations are those that it published, on its 32 GB and 40 GB
devices, in float16 as it ran them. What commands print is what they print here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt import cli  # noqa: E402
from gpt.config.derived import world_size  # noqa: E402
from gpt.config.schema import Config  # noqa: E402
from gpt.plan import devices, memory  # noqa: E402
from gpt.plan.search import GIB, limit  # noqa: E402
from gpt.plan.step_time import cost  # noqa: E402
from gpt.plan.summary import duration  # noqa: E402
from gpt.utils.files import replace_section  # noqa: E402

PAGE = ROOT / "docs" / "plan.md"
PREDECESSOR = {
    "345M single": ["model=345m"],
    "345M dp8, the released weights": ["experiment=345m_release"],
    "345M auto dp8": ["model=345m", "parallel=dp8", "model.recompute=full"],
    "345M mp8 (QAT)": ["model=345m", "parallel=single", "parallel.mp_degree=8", "trainer.micro_batch_size=1",
                       "trainer.global_batch_size=8"],
    "1.3B single": ["model=1.3b"],
    "1.3B dp8": ["model=1.3b", "parallel=dp8"],
    "6.7B sharding16": ["model=6.7b", "parallel=sharding16"],
    "13B mp2 pp8": ["model=13b", "parallel=single", "parallel.mp_degree=2", "parallel.pp_degree=8"],
    "175B mp8 pp16, first": ["model=175b", "parallel=mp8_pp16", "parallel.sequence_parallel=false",
                             "model.recompute=full"],
    "175B mp8 pp16, last": ["model=175b", "parallel=mp8_pp16"],
}  # fmt: skip
BUDGET = 300_000_000_000  # tokens: the released weights' archive says 300B
PRINTED = {
    "job": ["task=plan model=175b parallel=mp8_pp16 precision=bf16 device=a100_80 plan.token_budget=300000000000"],
    "fails": ["task=plan model=1.3b model.recompute=none precision=fp16 device=v100_32"],
    "grid": ["-m task=plan model=345m,1.3b,6.7b,175b parallel=dp8,sharding16,mp8_pp16 precision=bf16 device=a100_40"],
    "search": [
        "task=plan plan.search=true plan.devices=128 plan.top=6 model=175b precision=bf16 device=a100_80",
        "task=plan plan.search=true plan.devices=2048 plan.top=3 model=175b precision=bf16 device=h100",
    ],
}


def predecessor() -> str:
    """Markdown: what each published configuration needs on each device, and how long it takes."""
    columns = [
        "configuration",
        "ranks",
        "state",
        "activations",
        "working",
        "V100 32 GB",
        "a step",
        "A100 40 GB",
        "a step",
    ]
    lines = ["| " + " | ".join([*columns, "300 B tokens"]) + " |", "|---|" + "---:|" * len(columns)]
    for name, overrides in PREDECESSOR.items():
        job = cli.compose_job([*overrides, "precision=fp16"])
        configs = [replace(job, device=devices.table()[device]) for device in ("v100_32", "a100_40")]
        need = memory.memory(configs[0])
        cells = [f"{size / GIB:.1f}" for size in (need.state, need.activations, need.working)]
        lasts = ""
        for config in configs:
            found = cost(config)
            assert found is not None
            cells += [_fit(config), duration(found.seconds)]
            lasts = duration(BUDGET / found.tokens_per_second)
        lines.append(f"| {name} | {world_size(configs[0])} | {' | '.join([*cells, lasts])} |")
    return "\n".join(lines)


def _fit(config: Config) -> str:
    room = limit(config)
    assert room is not None
    spare = (room - memory.memory(config).total) / GIB
    return f"fits, {spare:.1f} free" if spare >= 0 else f"{-spare:.1f} too much"


def known_devices() -> str:
    """Markdown: the figures of conf/device."""
    lines = [
        "| device= | GiB | TFLOP/s bf16 | fp16 | fp32 | share | memory GB/s | in node GB/s | between nodes | W |",
        "|---|" + "---:|" * 9,
    ]
    for name, spec in devices.table().items():
        peaks = [spec.peak_tflops.bf16, spec.peak_tflops.fp16, spec.peak_tflops.fp32]
        links = [spec.bandwidth_gb_s, spec.intra_node_gb_s, spec.inter_node_gb_s, spec.watts]
        figures = [spec.memory_gib, *peaks, spec.efficiency, *links]
        lines.append(f"| {name} | " + " | ".join("–" if x is None else f"{x:g}" for x in figures) + " |")
    return "\n".join(lines)


def printed(commands: list[str]) -> str:
    """A block of commands, and a block of what they print."""
    said = []
    for command in commands:
        words = [sys.executable, "-m", "gpt.main", *command.split()]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
        said.append(subprocess.run(words, capture_output=True, text=True, check=True, env=env).stdout.rstrip())
    shown = "\n".join(f"python -m gpt.main {command}" for command in commands)
    return f"```bash\n{shown}\n```\n\n```text\n" + "\n\n".join(said) + "\n```"


def main() -> None:
    """Render."""
    replace_section(PAGE, "devices", known_devices())
    replace_section(PAGE, "predecessor", predecessor())
    for name, commands in PRINTED.items():
        replace_section(PAGE, name, printed(commands))


if __name__ == "__main__":
    main()
