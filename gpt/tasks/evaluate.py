"""Measure: the loss of a run's newest checkpoint over a whole split."""

from __future__ import annotations

import time
from pathlib import Path

from gpt import checkpoint
from gpt.config import global_batch_size
from gpt.data.samples import Samples
from gpt.engine import Engine
from gpt.files import write_json
from gpt.log import say
from gpt.meter import validation
from gpt.runs import Job
from gpt.topology import Topology


def run(job: Job) -> int:
    """Print and write ``evaluation.json``; returns the exit code."""
    config, split = job.config, job.config.evaluate.split
    samples = Samples(config, job.data, split, shuffled=False)
    topology = Topology.connect(config)
    found = checkpoint.require(Path(str(job.config.checkpoint)), lambda line: say(f"WARNING: {line}"), topology)
    engine = Engine(config, topology, train=False)
    engine.load(found.model(), None, {})

    every = -(-len(samples) // global_batch_size(config))
    batches = min(config.evaluate.max_batches or every, every)
    began = time.perf_counter()
    loss = engine.evaluate(samples, batches)
    count = min(batches * global_batch_size(config), len(samples))
    record = {"step": found.state["step"], "split": split.value, "samples": count}
    record |= {key.removeprefix("val/"): value for key, value in validation(loss, job.data).items()}
    record["tokens_per_second"] = count * config.data.seq_len / (time.perf_counter() - began)

    if topology.rank > 0:
        return 0
    write_json(job.run_dir / "evaluation.json", record)
    say("  ".join(f"{k} {v:,.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()))
    return 0
