"""Export: a checkpoint to a folder for other programs."""

from __future__ import annotations

from pathlib import Path

from gpt.config.derived import global_batch_size, one_rank
from gpt.config.task_schemas import Split, Target
from gpt.data import token_files
from gpt.data.dataset import TokenDataset
from gpt.parallel.topology import Topology
from gpt.runs.checkpoint import checkpoint
from gpt.runs.convert import export_weights, paddle_inference
from gpt.runs.convert.paddle_inference import Rounded
from gpt.runs.run_dir import Job
from gpt.train.trainer import Trainer
from gpt.utils.console import say


def run(job: Job) -> int:
    """Write ``export.output``; returns the exit code."""
    asked, config = job.config.export, one_rank(job.config)
    found = checkpoint.load_or_fail(Path(str(config.checkpoint)), lambda line: say(f"WARNING: {line}"))
    topology, output = Topology.initialize(config), Path(str(asked.output))
    if asked.format is Target.huggingface:
        names = export_weights.to_huggingface(found, config.model, output)
    else:
        names = paddle_inference.export(found, config.model, output, small=asked.format is Target.int8)
    size = sum((output / name).stat().st_size for name in names)
    say(f"exported step {found.state['step']:,} to {output}: {', '.join(names)} ({size / 1e6:,.1f} MB)")
    if found.tokenizer is None:
        say("WARNING: the checkpoint has no tokenizer, so the folder has none")
    if asked.format is Target.int8:
        say(_cost(job, found, topology))
    return 0


def _cost(job: Job, found: checkpoint.Checkpoint, topology: Topology) -> str:
    """What eight bits do to the loss on the validation split, or on the first ``evaluate.max_samples`` of it."""
    files = [token_files.paths_of(part.path)[0] for part in job.data.parts]
    if not files or not all(file.exists() for file in files):
        return "what eight bits cost is not measured: the data of this checkpoint is not here"
    samples = TokenDataset(job.config, job.data, Split.val, shuffled=False)
    wanted = min(job.config.evaluate.max_samples or len(samples), len(samples))
    batches = -(-wanted // global_batch_size(job.config))
    engine, losses = Trainer(job.config, topology, train=False), []
    stored = found.model()
    for source in (stored, Rounded(stored.folder, stored.index)):
        engine.load(source, None, {})
        losses.append(engine.evaluate(samples, batches))
    before, after = losses
    return f"val/loss {before:.4f} in float32, {after:.4f} with int8 weights ({after - before:+.5f})"
