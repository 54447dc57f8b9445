"""Tokens per second of a training step, side by side in one run: ours, plain Paddle, Hugging Face on torch.

    pip install -e '.[cpu,bench]'
    python scripts/bench_train.py --model 124m --batch 1 --rounds 7
    python scripts/bench_train.py --model tiny --batch 8 --rounds 15 --out docs/bench_tiny.json

Every variant is a process of its own that makes one step when it is told to. The parent goes round them, so a
machine that slows down slows all of them; medians and, against 'ours', medians of the per-round ratios are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt import cli  # noqa: E402
from gpt.config.cluster import Device  # noqa: E402
from gpt.config.schema import Config  # noqa: E402

VARIANTS = {
    "ours": "this project, as its launcher starts it",
    "bare": "this project's forward, backward, clip, update on one batch: no data, records, logs",
    "plain+env": "plain Paddle GPT in our launcher's environment",
    "plain": "plain Paddle GPT, Paddle as installed",
    "hf": "Hugging Face transformers GPT-2, torch eager fp32",
}


def configuration(model: str, batch: int, dropout: float) -> Config:
    """The job that every variant trains: the preset's shape on random tokens."""
    overrides = [
        f"model={model}", "data=tokens", "data.path=none", f"trainer.micro_batch_size={batch}",
        f"trainer.global_batch_size={batch}", f"model.dropout={dropout}", f"model.attention_dropout={dropout}",
        "cluster.device=cpu",
    ]  # fmt: skip
    return cli.compose_job(overrides)


class RandomSamples:
    """Stands in for ``gpt.data.dataset.TokenDataset``: the cost of reading is part of 'ours' by the same arrays."""

    def __init__(self, config: Config) -> None:
        import numpy as np

        self.rows = np.random.default_rng(0).integers(0, config.model.vocab, (64, config.data.seq_len + 1))

    def batch(self, first: int, count: int) -> Any:
        """Some rows."""
        import numpy as np

        from gpt.data.dataset import Batch

        rows = self.rows[[(first + i) % len(self.rows) for i in range(count)]]
        inputs = np.ascontiguousarray(rows[:, :-1])
        return Batch(inputs, np.ascontiguousarray(rows[:, 1:]), np.ones(inputs.shape, np.float32))


def make_step(variant: str, config: Config) -> Callable[[], float]:
    """A function that makes one step and returns the loss."""
    samples = RandomSamples(config)
    batch = samples.batch(0, config.trainer.global_batch_size or 1)
    if variant == "hf":
        return _hf_step(config, batch)
    import paddle

    paddle.set_device("cpu")
    inputs, labels, mask = (paddle.to_tensor(a) for a in (batch.inputs_BT, batch.labels_BT, batch.mask_BT))
    if variant.startswith("plain"):
        from scripts.plain_gpt import PlainTrainer

        trainer = PlainTrainer(config)
        return lambda: trainer.step(inputs, labels, mask)

    from gpt.parallel.topology import Topology
    from gpt.train import grad_norm
    from gpt.train.trainer import Trainer

    engine = Trainer(config, Topology(config.parallel, Device.cpu))
    if variant == "bare":
        parameters = list(engine.parameters.values())

        def bare() -> float:
            loss = engine.model.loss(inputs, labels, mask, float(mask.size))
            loss.backward()
            grad_norm.clip(parameters, grad_norm.global_norm(parameters), config.optimizer.clip_norm)
            engine.strategy.optimizer.step()
            engine.strategy.optimizer.clear_grad(set_to_zero=False)
            return float(loss.item())

        engine.model.train()
        return bare
    return _our_loop(config, engine, samples)


def _our_loop(config: Config, engine: Any, samples: Any) -> Callable[[], float]:
    """What the training loop does around a step, too: record, metrics.jsonl, a line."""
    import tempfile

    from gpt.train.loggers.base import Jsonl
    from gpt.train.metrics import Meter

    meter, sink, number = Meter(config), Jsonl(Path(tempfile.mkdtemp()) / "metrics.jsonl"), 0

    def step() -> float:
        nonlocal number
        number += 1
        meter.start()
        result = engine.step(number, samples)
        sink.write(meter.record(number, result))
        return float(result.loss)

    return step


def _hf_step(config: Config, batch: Any) -> Callable[[], float]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    m = config.model
    shape = {"vocab_size": m.vocab, "n_positions": m.positions, "n_embd": m.hidden, "n_layer": m.layers}
    dropout = {"resid_pdrop": m.dropout, "embd_pdrop": m.dropout, "attn_pdrop": m.attention_dropout}
    model = GPT2LMHeadModel(GPT2Config(n_head=m.heads, **shape, **dropout))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, weight_decay=0.01)
    inputs, labels = torch.from_numpy(batch.inputs_BT), torch.from_numpy(batch.labels_BT)

    def step() -> float:
        logits = model(inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return step


def serve(variant: str, config: Config) -> None:
    """The child: one step per line of standard input."""
    step = make_step(variant, config)
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - began
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"seconds": seconds, "loss": loss, "rss_gib": rss}), flush=True)


def start(variant: str, arguments: argparse.Namespace, config: Config) -> subprocess.Popen[str]:
    """Start a child in the environment of its variant."""
    from gpt.utils import machine
    from launchers import local

    if variant == "plain":
        env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_", "GLIBC_"))}
    elif variant == "hf":
        env = {**os.environ, "OMP_NUM_THREADS": str(machine.cores()), "GLIBC_TUNABLES": local.MALLOC}
    else:
        env = local.environment(config, 1)
    options = ["--model", arguments.model, "--batch", str(arguments.batch), "--dropout", str(arguments.dropout)]
    return child_of(__file__, [*options, "--serve", variant], env)


def child_of(script: str, options: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    """Start a script that says 'ready' and then answers each line of its standard input."""
    env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-W", "ignore", script, *options]
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout
    if "ready" not in child.stdout.readline():
        raise SystemExit(f"a variant did not start; try: {' '.join(command)}")
    return child


def ask(child: subprocess.Popen[str]) -> dict[str, float]:
    """One step of a child."""
    assert child.stdin
    assert child.stdout
    child.stdin.write("step\n")
    child.stdin.flush()
    line = child.stdout.readline()
    if not line:
        raise SystemExit(f"a variant died (out of memory? try fewer --variants): {child.args!r}")
    answer: dict[str, float] = json.loads(line)
    return answer


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="124m")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    config = configuration(arguments.model, arguments.batch, arguments.dropout)
    if arguments.serve:
        serve(arguments.serve, config)
        return
    chosen = arguments.variants.split(",")
    children = {variant: start(variant, arguments, config) for variant in chosen}
    for child in children.values():
        ask(child), ask(child)  # warm-up
    rows: dict[str, list[dict[str, float]]] = {variant: [] for variant in chosen}
    for _ in range(arguments.rounds):
        for variant, child in children.items():
            rows[variant].append(ask(child))
    for child in children.values():
        child.kill()
    report(arguments, config, rows)


def report(arguments: argparse.Namespace, config: Config, rows: dict[str, list[dict[str, float]]]) -> None:
    """A Markdown table, and the figures as JSON if asked."""
    tokens = arguments.batch * config.data.seq_len
    print(f"{arguments.model}, batch {arguments.batch} x {config.data.seq_len}, dropout {arguments.dropout}, ")
    print(f"{arguments.rounds} rounds, {len(os.sched_getaffinity(0))} cores\n")
    print("| variant | tok/s (median) | min to max | ours / it | peak RSS GiB | |\n|---|---|---|---|---|---|")
    summary = {}
    for variant, steps in rows.items():
        rates = [tokens / step["seconds"] for step in steps]
        ratio = float("nan")
        if "ours" in rows:
            ratio = statistics.median(s["seconds"] / o["seconds"] for s, o in zip(steps, rows["ours"], strict=True))
        rate, rss = statistics.median(rates), steps[-1]["rss_gib"]
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        print(f"| {variant} | {rate:,.0f} | {spread} | {ratio:.2f} | {rss:.2f} | {VARIANTS[variant]} |")
        summary[variant] = {"tokens_per_second": rate, "ours_over_it": ratio, "rss_gib": rss}
    if arguments.out:
        arguments.out.write_text(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
