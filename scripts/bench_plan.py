"""The plan beside counts that others made, and beside runs that others have published.

    pip install -e '.[bench]'
    python scripts/bench_plan.py

'counts': parameters and matrix products of Hugging Face's GPT-2 in every model's shape, on a device without memory, as
torch's ``FlopCounterMode`` counts them forward and backward. 'published': seconds of a step, as the plan says them for
a device of ``conf/device`` with the efficiency stated there, beside what a paper, a log or a thread reports. Both
tables go into docs/plan-validation.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt import cli  # noqa: E402
from gpt.config.derived import padded_vocab  # noqa: E402
from gpt.config.schema import Config  # noqa: E402
from gpt.plan import flops as flop_counts  # noqa: E402
from gpt.plan import memory  # noqa: E402
from gpt.plan.step_time import cost  # noqa: E402
from gpt.utils.files import replace_section  # noqa: E402

PAGE = ROOT / "docs" / "plan-validation.md"
COMMON = ["data=tokens", "data.path=none", "trainer.max_steps=1"]
# Parameters that Hugging Face reports for OpenAI's four GPT-2 (vocabulary 50,257, not padded).
GPT2 = {
    "124M": (768, 12, 124_439_808), "355M": (1024, 24, 354_823_168), "774M": (1280, 36, 774_030_080),
    "1558M": (1600, 48, 1_557_611_200),
}  # fmt: skip


def shape(hidden: int, layers: int, heads: int, vocab: int, length: int) -> list[str]:
    """Overrides of a model."""
    return [
        "model=345m", f"model.hidden={hidden}", f"model.layers={layers}", f"model.heads={heads}",
        f"model.ffn={4 * hidden}", f"model.vocab={vocab}", f"model.positions={length}", f"data.seq_len={length}",
    ]  # fmt: skip


def count_with_torch(config: Config) -> tuple[int, float]:
    """Parameters of Hugging Face's GPT-2 of the same shape, and FLOPs of one training token, attention in full."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import GPT2Config, GPT2LMHeadModel

    m, length = config.model, config.data.seq_len
    wanted = GPT2Config(
        vocab_size=padded_vocab(config), n_embd=m.hidden, n_layer=m.layers, n_head=m.heads, n_inner=m.ffn,
        n_positions=m.positions, attn_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        model, tokens = GPT2LMHeadModel(wanted), torch.zeros(1, length, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with counter:
        model(tokens).logits.sum().backward()
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / length


def count_rows() -> Iterator[str]:
    """Every model of ``conf/model``, and GPT-2's parameters as published."""
    yield "| model | parameters: plan | counted | FLOPs a token, whole square: plan | counted | causal: plan |"
    yield "|---|---|---|---|---|---|"
    for path in sorted((ROOT / "conf" / "model").glob("*.yaml")):
        config = cli.compose_job([f"model={path.stem}", *COMMON])
        found, flops = count_with_torch(config)
        ours = flop_counts.flops_per_token(config, causal=False)
        parameters = flop_counts.parameters(config)
        assert (parameters, ours) == (found, flops), f"{path.stem}: {parameters, ours} and {found, flops}"
        causal = flop_counts.flops_per_token(config)
        yield f"| {path.stem} | {parameters:,} | {found:,} | {ours:,.0f} | {flops:,.0f} | {causal:,.0f} |"
    for name, (hidden, layers, published) in GPT2.items():
        config = cli.compose_job([*shape(hidden, layers, hidden // 64, 50257, 1024), *COMMON])
        ours = flop_counts.parameters(config, padded=False)
        yield f"| GPT-2 {name}, not padded | {ours:,} | {published:,} (published) |  |  |  |"


@dataclass(frozen=True)
class Run:
    """Somebody's run.

    Attributes:
        name: of the run.
        source: key of ``SOURCES``.
        overrides: that describe it.
        seconds: of a step.
        gib: of the fullest device; None: not said.
    """

    name: str
    source: str
    overrides: list[str]
    seconds: float
    gib: float | None = None

    @property
    def config(self) -> Config:
        """The job."""
        return cli.compose_job([*self.overrides, *COMMON])


SOURCES = {
    "N": "Narayanan et al. 2021, arXiv:2104.04473, table 1: TFLOP/s per GPU by its equation 3, turned into seconds; "
    "micro batches and chunks are not stated, 1 and 1 here",
    "N2": "the same, table 2, PTD-P",
    "K": "Korthikanti et al. 2022, arXiv:2205.05198, tables 3 and 5",
    "S": "Smith et al. 2022 (MT-NLG), arXiv:2201.11990, section 2.4",
    "G": "github.com/karpathy/nanoGPT/issues/110",
    "L": "github.com/karpathy/llm.c/discussions/481: 10B tokens in 90 minutes",
    "L2": "github.com/karpathy/llm.c/discussions/677: 32,000 steps of 1,048,576 tokens in 24 hours",
    "J": "github.com/openxla/xla/issues/8210: 465.45 sequences a second; how it was laid out is not stated, dp here",
    "F": "PaddleFleetX, docs/single_card.md of 2022-09-21",
    "F4": "PaddleFleetX, docs/hybrid_parallel.md of 2022-09-21; it says 1.3B, but the log's first loss, 10.99, is that "
    "of a model 1,024 wide (1.3B starts at 11.24), so the shape is 345M's here",
    "F2": "github.com/PaddlePaddle/PaddleFleetX/pull/752; device not stated, by its memory an A100 of 40 GB",
    "F3": "github.com/PaddlePaddle/PaddleFleetX/pull/613; device not stated, taken for an A100",
}
MEGATRON = {  # name: hidden, layers, heads, mp, pp, GPUs, batch, TFLOP/s per GPU
    "1.7B": (2304, 24, 24, 1, 1, 32, 512, 137), "3.6B": (3072, 30, 32, 2, 1, 64, 512, 138),
    "7.5B": (4096, 36, 32, 4, 1, 128, 512, 142), "18.4B": (6144, 40, 48, 8, 1, 256, 1024, 135),
    "39.1B": (8192, 48, 64, 8, 2, 512, 1536, 138), "76.1B": (10240, 60, 80, 8, 4, 1024, 1792, 140),
    "145.6B": (12288, 80, 96, 8, 8, 1536, 2304, 148), "310.1B": (16384, 96, 128, 8, 16, 1920, 2160, 155),
    "529.6B": (20480, 105, 128, 8, 35, 2520, 2520, 163), "1008B": (25600, 128, 160, 8, 64, 3072, 3072, 163),
}  # fmt: skip
PTD = {  # hidden, layers, heads, pp, batch; (GPUs, TFLOP/s per GPU)
    "174.6B": (12288, 96, 96, 12, 1536, ((384, 153), (768, 149), (1536, 141))),
    "529.6B": (20480, 105, 128, 35, 2240, ((560, 171), (1120, 167), (2240, 159))),
}
KORTHIKANTI = {  # hidden, layers, heads, pp, chunks, micro batch, batch; seconds with full recomputation, with theirs
    "22B": (6144, 48, 64, 1, 1, 4, 4, 1.42, 1.10), "175B": (12288, 96, 96, 8, 3, 1, 64, 18.13, 13.75),
    "530B": (20480, 105, 128, 35, 3, 1, 280, 49.05, 37.83), "1T": (25600, 128, 160, 64, 1, 1, 512, 94.42, 71.49),
}  # fmt: skip
A100 = ["device=a100_80", "device.attention=matrix", "precision=bf16"]
V100 = ["device=v100_32", "precision=fp16"]


def layout(dp: int = 1, mp: int = 1, pp: int = 1, batch: int = 1, micro: int = 1, chunks: int = 1) -> list[str]:
    """Overrides of degrees and batch."""
    return [
        "parallel=single", f"parallel.dp_degree={dp}", f"parallel.mp_degree={mp}", f"parallel.pp_degree={pp}",
        f"parallel.virtual_pp_degree={chunks}", f"trainer.global_batch_size={batch}",
        f"trainer.micro_batch_size={micro}",
    ]  # fmt: skip


def megatron_seconds(hidden: int, layers: int, gpus: int, batch: int, tflops: float) -> float:
    """Of a step at so many TFLOP/s per GPU by equation 3 of Narayanan et al. 2021: 96 B s l h^2 (1 + s/6h + V/16lh)."""
    s, vocab = 2048, 51200
    work = 96 * batch * s * layers * hidden**2 * (1 + s / (6 * hidden) + vocab / (16 * layers * hidden))
    return work / (tflops * 1e12 * gpus)


def runs() -> Iterator[Run]:
    """All of them."""
    full = ["model.recompute=full"]
    for name, (hidden, layers, heads, mp, pp, gpus, batch, tflops) in MEGATRON.items():
        model = [*shape(hidden, layers, heads, 51200, 2048), *A100, *full]
        config = [*model, *layout(gpus // mp // pp, mp, pp, batch)]
        seconds = megatron_seconds(hidden, layers, gpus, batch, tflops)
        yield Run(f"Megatron-LM {name}, {gpus:,} A100", "N", config, seconds)
    for name, (hidden, layers, heads, pp, batch, measured) in PTD.items():
        for gpus, tflops in measured:
            model = [*shape(hidden, layers, heads, 51200, 2048), *A100, *full]
            config = [*model, *layout(gpus // 8 // pp, 8, pp, batch)]
            seconds = megatron_seconds(hidden, layers, gpus, batch, tflops)
            yield Run(f"Megatron-LM {name}, {gpus:,} A100", "N2", config, seconds)
    for name, (hidden, layers, heads, pp, chunks, micro, batch, slow, quick) in KORTHIKANTI.items():
        model = [*shape(hidden, layers, heads, 51200, 2048), *A100, *layout(1, 8, pp, batch, micro, chunks)]
        theirs = ["model.recompute=core_attn", "parallel.sequence_parallel=true"]
        yield Run(f"Megatron-LM {name}, {8 * pp} A100, full", "K", [*model, *full], slow)
        yield Run(f"Megatron-LM {name}, {8 * pp} A100, core_attn, SP", "K", [*model, *theirs], quick)
    for nodes, seconds in ((280, 60.1), (350, 50.2), (420, 44.4)):
        model = [*shape(20480, 105, 128, 51200, 2048), *A100, *full, *layout(nodes * 8 // 280, 8, 35, 1920)]
        yield Run(f"MT-NLG 530B, {nodes * 8:,} A100", "S", model, seconds)
    small = [*shape(768, 12, 12, 50257, 1024), "precision=bf16", "model.dropout=0", "model.attention_dropout=0"]
    yield Run("nanoGPT 124M, 8 A100", "G", [*small, "device=a100_40", *layout(8, batch=480, micro=12)], 0.562)
    tokens = 512 * 1024 / 10e9
    yield Run("llm.c 124M, 8 A100", "L", [*small, "device=a100_80", *layout(8, batch=512, micro=64)], 5400 * tokens)
    large = [*shape(1600, 48, 25, 50257, 1024), "precision=bf16", "model.dropout=0", "model.attention_dropout=0"]
    yield Run("llm.c 1558M, 8 H100", "L2", [*large, "device=h100", *layout(8, batch=1024, micro=16)], 86400 / 32000)
    model = [*shape(4096, 24, 32, 50304, 2048), *A100]
    yield Run("Rosetta 5B, 256 A100", "J", [*model, *layout(256, batch=2048, micro=8)], 2048 / 465.45)
    yield Run("345M, one V100", "F", ["model=345m", *V100, *layout(batch=8, micro=8)], 0.502, 30.9)
    model = ["model=1.3b", *V100, *full]
    yield Run("1.3B, one V100", "F", [*model, *layout(batch=8, micro=8)], math.nan, 26.0)
    model = ["model=345m", *V100, *full]
    yield Run("345M, dp8 on V100", "F4", [*model, *layout(8, batch=64, micro=8)], 0.719)
    model = ["model=1.3b", *A100, "device=a100_40", *full]
    yield Run("1.3B, one A100", "F2", [*model, *layout(batch=8, micro=8)], 8192 / 14954, 37428 / 1024)
    yield Run("1.3B, dp8 on A100", "F2", [*model, *layout(8, batch=64, micro=8)], 65536 / 113371, 38942 / 1024)
    model = ["model=345m", *A100, "device=a100_40", "model.recompute=full_attn"]
    yield Run("345M, dp8 on A100", "F3", [*model, *layout(8, batch=128, micro=16)], 131072 / 240203)


def implied(config: Config, seconds: float) -> float | None:
    """The efficiency with which the plan would say exactly ``seconds``; None: what is not a product takes longer."""
    low, high = 0.01, 1.5
    for _ in range(40):
        middle = (low + high) / 2
        said = cost(replace(config, device=replace(config.device, efficiency=middle)))
        assert said is not None
        low, high = (middle, high) if said.seconds > seconds else (low, middle)
    return high if high < 1.49 else None


def published_rows() -> Iterator[str]:
    """A line per run."""
    yield "| run | source | published, s | plan, s | error | plan's MFU | efficiency: stated | implied |"
    yield "|---|---|---|---|---|---|---|---|"
    errors = []
    for run in runs():
        config = run.config
        said = cost(config)
        assert said is not None, run.name
        if math.isnan(run.seconds):  # memory only
            continue
        error, needed = said.seconds / run.seconds - 1, implied(config, run.seconds)
        errors.append(abs(error))
        figures = [f"{run.seconds:.3g}", f"{said.seconds:.3g}", f"{error:+.0%}", f"{said.mfu:.0%}"]
        figures += [str(config.device.efficiency), f"{needed:.2f}" if needed else "none"]
        yield f"| {run.name} | {run.source} | {' | '.join(figures)} |"
    yield ""
    errors.sort()
    yield f"Half of the errors are below {errors[len(errors) // 2]:.0%}, the largest is {errors[-1]:.0%}."
    yield ""
    yield "| run | source | published, GiB | plan, GiB | error |"
    yield "|---|---|---|---|---|"
    for run in runs():
        if run.gib is not None:
            need = memory.memory(run.config).total / 2**30
            yield f"| {run.name} | {run.source} | {run.gib:.1f} | {need:.1f} | {need / run.gib - 1:+.0%} |"
    yield ""
    yield from (f"- {key}: {text}" for key, text in SOURCES.items())


def main() -> None:
    """Write both tables."""
    for section, rows in (("published", published_rows()), ("counts", count_rows())):
        lines = []
        for row in rows:
            print(row, flush=True)
            lines.append(row)
        replace_section(PAGE, section, "\n".join(lines))


if __name__ == "__main__":
    main()
