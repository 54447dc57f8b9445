"""Export: a checkpoint to a folder for other programs."""

from __future__ import annotations

from pathlib import Path

from gpt import checkpoint
from gpt.config import global_batch_size, one_rank
from gpt.config_text import Split
from gpt.config_weights import Target
from gpt.data import tokens
from gpt.data.samples import Samples
from gpt.engine import Engine
from gpt.log import say
from gpt.runs import Job
from gpt.topology import Topology
from gpt.weights import exporting, static
from gpt.weights.eight_bits import Rounded


def run(job: Job) -> int:
    """Write ``export.output``; returns the exit code."""
    asked, config = job.config.export, one_rank(job.config)
    found = checkpoint.require(Path(str(config.checkpoint)), lambda line: say(f"WARNING: {line}"))
    topology, output = Topology.connect(config), Path(str(asked.output))
    if asked.format is Target.huggingface:
        names = exporting.to_huggingface(found, config.model, output)
    else:
        names = static.export(found, config.model, output, small=asked.format is Target.int8)
    size = sum((output / name).stat().st_size for name in names)
    say(f"exported step {found.state['step']:,} to {output}: {', '.join(names)} ({size / 1e6:,.1f} MB)")
    if found.tokenizer is None:
        say("WARNING: the checkpoint has no tokenizer, so the folder has none")
    if asked.format is Target.int8:
        say(_cost(job, found, topology))
    return 0


def _cost(job: Job, found: checkpoint.Checkpoint, topology: Topology) -> str:
    """What eight bits do to the loss on the validation split, or on the first ``evaluate.max_samples`` of it."""
    files = [tokens.paths_of(part.path)[0] for part in job.data.parts]
    if not files or not all(file.exists() for file in files):
        return "what eight bits cost is not measured: the data of this checkpoint is not here"
    samples = Samples(job.config, job.data, Split.val, shuffled=False)
    wanted = min(job.config.evaluate.max_samples or len(samples), len(samples))
    batches = -(-wanted // global_batch_size(job.config))
    engine, losses = Engine(job.config, topology, train=False), []
    stored = found.model()
    for source in (stored, Rounded(stored.folder, stored.index)):
        engine.load(source, None, {})
        losses.append(engine.evaluate(samples, batches))
    before, after = losses
    return f"val/loss {before:.4f} in float32, {after:.4f} with int8 weights ({after - before:+.5f})"
