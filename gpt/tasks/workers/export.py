"""``task=export``: a checkpoint to a folder for other programs."""

from __future__ import annotations

from pathlib import Path

from gpt.config.derived import one_rank
from gpt.config.task_schemas import Target
from gpt.parallel.topology import Topology
from gpt.runs.checkpoint import checkpoint
from gpt.runs.convert import export_weights, paddle_inference
from gpt.runs.run_dir import Job
from gpt.utils.console import say
from gpt.utils.signals import Signals


def run(job: Job, signals: Signals) -> int:
    """Write ``export.output``; return the exit code."""
    config = one_rank(job.config)
    source = checkpoint.load_or_fail(Path(str(config.checkpoint)), lambda line: say(f"WARNING: {line}"))
    topology, output = Topology.initialize(config), Path(str(config.export.output))
    if config.export.format is Target.huggingface:
        names = export_weights.to_huggingface(source, config.model, output)
    else:
        names = paddle_inference.export(source, config, topology, output)
    size = sum((output / name).stat().st_size for name in names)
    say(f"exported step {source.state['step']:,} to {output}: {', '.join(names)} ({size / 1e6:,.1f} MB)")
    if source.tokenizer is None:
        say("WARNING: the checkpoint has no tokenizer, so the folder has none")
    return 0
