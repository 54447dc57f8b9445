"""Tokens per second of greedy decoding, side by side in one run: ours, and Hugging Face transformers on torch.

    pip install -e '.[cpu,bench]'
    python scripts/bench_generate.py --rounds 5 --write

Each variant is a process of its own with a model of the same shape and random weights, in float32 on all cores; the
parent goes round them, so a machine that slows down slows all of them. Prefill is the time to the first new token of a
prompt, decoding what each further step takes. ``--write`` puts the tables into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt.config.cluster import Device  # noqa: E402
from gpt.config.schema import Config, Task  # noqa: E402
from gpt.utils import machine  # noqa: E402
from gpt.utils.arrays import Array  # noqa: E402
from gpt.utils.files import replace_section  # noqa: E402
from launchers import local  # noqa: E402
from scripts.bench_train import ask, child_of, configuration  # noqa: E402

VARIANTS = {
    "ours": "this project's `ModelWriter`, as its launcher starts it",
    "hf": "Hugging Face transformers `generate` on torch, eager, with its default cache",
}
Write = Callable[[list[list[int]], int], int]


class Silent:
    """An encoder for random weights, whose text nobody reads."""

    vocab = 0
    eot: int | None = None
    digest = ""

    def encode(self, text: str) -> Array:
        """Nothing."""
        return np.zeros(0, dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """A letter for each token."""
        return "x" * len(ids)


def ours(config: Config) -> Write:
    """Continues prompts by a number of tokens; returns how many it made."""
    import paddle

    from gpt.config.sampling import Sampling
    from gpt.inference.generator import Generator
    from gpt.model.gpt import GPT
    from gpt.parallel.topology import Topology

    paddle.set_device("cpu")
    model = GPT(config, Topology(config.parallel, Device.cpu))
    model.initialise()
    writer = Generator(model, Silent(), 0)

    def write(prompts: list[list[int]], new: int) -> int:
        found = writer.write(prompts, Sampling(new, min_new_tokens=new, temperature=0))
        return sum(len(text.tokens) for texts in found for text in texts)

    return write


def hf(config: Config) -> Write:
    """The same by transformers."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    m = config.model
    shape = {"vocab_size": m.vocab, "n_positions": m.positions, "n_embd": m.hidden, "n_layer": m.layers}
    model = GPT2LMHeadModel(GPT2Config(n_head=m.heads, bos_token_id=None, eos_token_id=None, **shape)).eval()

    def write(prompts: list[list[int]], new: int) -> int:
        rows = torch.tensor(prompts)
        with torch.no_grad():
            out = model.generate(
                rows, attention_mask=torch.ones_like(rows), max_new_tokens=new, do_sample=False, pad_token_id=0
            )
        return int(out.shape[0] * (out.shape[1] - rows.shape[1]))

    return write


def serve(variant: str, arguments: argparse.Namespace) -> None:
    """The child: both batch sizes once per line of standard input."""
    config = configuration(arguments.model, 1, 0.0)
    write = {"ours": ours, "hf": hf}[variant](config)
    rng = np.random.default_rng(0)
    print("ready", flush=True)
    for _ in sys.stdin:
        found = {}
        for batch in arguments.batch:
            prompts = rng.integers(0, config.model.vocab, (batch, arguments.prompt)).tolist()
            times = []
            for new in (1, 1 + arguments.new):
                began = time.perf_counter()
                assert write(prompts, new) == batch * new
                times.append(time.perf_counter() - began)
            found[f"prefill {batch}"] = times[0]
            found[f"decode {batch}"] = (times[1] - times[0]) / arguments.new
        print(json.dumps(found), flush=True)


def start(variant: str, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    """A child in the environment of its variant."""
    env = {**os.environ, "OMP_NUM_THREADS": str(machine.cores()), "GLIBC_TUNABLES": local.MALLOC}
    if variant == "ours":
        config = configuration(arguments.model, 1, 0.0)
        env = local.environment(dataclasses.replace(config, task=Task.generate), 1)
    options = ["--model", arguments.model, "--prompt", str(arguments.prompt), "--new", str(arguments.new)]
    batches = ["--batch", *map(str, arguments.batch)]
    return child_of(__file__, [*options, *batches, "--serve", variant], env)


def measure(arguments: argparse.Namespace) -> str:
    """A table for one model."""
    children = {variant: start(variant, arguments) for variant in arguments.variants}
    rounds: list[dict[str, dict[str, float]]] = []
    try:
        for number in range(arguments.rounds + 1):
            found = {variant: ask(child) for variant, child in children.items()}
            rounds += [found] if number else []  # the first warms up
    finally:
        for child in children.values():
            child.kill()
    lines = [
        f"| {arguments.model} | batch | prefill ms | decode tok/s (median) | min to max | ours / it | |",
        "|---|---|---|---|---|---|---|",
    ]
    for batch in arguments.batch:
        for variant in arguments.variants:
            seconds = [found[variant][f"decode {batch}"] for found in rounds]
            ratio = statistics.median(
                found[variant][f"decode {batch}"] / found["ours"][f"decode {batch}"] for found in rounds
            )
            prefill = statistics.median(found[variant][f"prefill {batch}"] for found in rounds) * 1e3
            rate = f"{batch / statistics.median(seconds):,.0f}"
            spread = f"{batch / max(seconds):,.0f} to {batch / min(seconds):,.0f}"
            lines.append(
                f"| {variant} | {batch} | {prefill:,.0f} | {rate} | {spread} | {ratio:.2f} | {VARIANTS[variant]} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["124m", "tiny"])
    parser.add_argument("--model", default="124m", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=63, help="tokens after the first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments)
        return
    tables = []
    for model in arguments.models:
        arguments.model = model
        tables.append(measure(arguments))
        print(tables[-1], flush=True)
    if arguments.write:
        command = f"```bash\npython scripts/bench_generate.py --rounds {arguments.rounds} --write\n```\n\n"
        about = (
            f"Prompts of {arguments.prompt} tokens, {arguments.new} more after the first, float32, {machine.cores()} "
            f"cores; medians of {arguments.rounds} rounds in which the variants take turns.\n\n"
        )
        replace_section(ROOT / "docs/benchmarks.md", "bench_generate", command + about + "\n\n".join(tables))


if __name__ == "__main__":
    main()
