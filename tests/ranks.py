"""What tests run on every rank, through ``harness.run``. Arguments and results are what JSON holds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import paddle

from gpt.config.derived import typed, world_size
from gpt.config.sampling import Sampling
from gpt.config.task_schemas import Split
from gpt.data.corpus import DatasetInfo
from gpt.data.dataset import TokenDataset
from gpt.inference.generator import Generator
from gpt.parallel.topology import Topology
from gpt.runs.checkpoint import checkpoint, shard_files
from gpt.runs.checkpoint import saver as checkpoint_saver
from gpt.runs.run_dir import Job
from gpt.tasks.workers.generate import in_batches
from gpt.train.optimizer import DynamicLossScaler
from gpt.train.trainer import Trainer


def where(config: dict[str, Any]) -> dict[str, Any]:
    """This rank's place, and the sum of all ranks' numbers."""
    topology = Topology.initialize(typed(config))
    place = {key: getattr(topology, key) for key in ("rank", "replica", "mp_rank", "stage", "reports_loss")}
    return {
        **place,
        "totals": topology.all_reduce_sum(topology.rank, 1.0),
        "largest": topology.all_reduce_max(topology.rank / 4),
    }


def train(config: dict[str, Any], data: dict[str, Any], steps: int) -> dict[str, Any]:
    """Losses and gradient norms of some steps, and the validation loss after them."""
    job = typed(config)
    prepared = DatasetInfo.from_plain(data)
    engine = Trainer(job, Topology.initialize(job))
    samples = TokenDataset(job, prepared, Split.train)
    results = [engine.step(n, samples) for n in range(1, steps + 1)]
    return {
        "loss": [r.loss for r in results],
        "grad_norm": [r.grad_norm for r in results],
        "val": engine.evaluate(TokenDataset(job, prepared, Split.val, shuffled=False), 10**6),
    }


def allocated(config: dict[str, Any]) -> dict[str, int]:
    """Bytes of this rank after two steps on random tokens, and the most at any moment."""
    from paddle.base import core

    from scripts.rank_jobs import RandomSamples

    job = typed(config)
    engine, samples = Trainer(job, Topology.initialize(job)), RandomSamples(job)
    for number in (1, 2):
        engine.step(number, samples)  # type: ignore[arg-type]
    statistics = core.host_memory_stat_current_value, core.host_memory_stat_peak_value
    return {name: value("Allocated", 0) for name, value in zip(("between", "peak"), statistics, strict=True)}


def overflow(config: dict[str, Any], data: dict[str, Any]) -> list[Any]:
    """With a loss scale: norm, then that of a step whose gradients overflow on the last rank, scale, weight, norm."""
    job = typed(config)
    engine = Trainer(job, Topology.initialize(job))
    engine.loss_scale = DynamicLossScaler(value=4.0)
    samples = TokenDataset(job, DatasetInfo.from_plain(data), Split.train)
    first = engine.step(1, samples).grad_norm
    before = engine.parameters["layers.0.fc1.weight"].numpy()
    if engine.topology.replica == 1:
        engine.loss_scale.scale = lambda loss: loss * float("inf")  # type: ignore[method-assign]
    second = engine.step(2, samples).grad_norm
    same = bool((engine.parameters["layers.0.fc1.weight"].numpy() == before).all())
    return [first, second, engine.loss_scale.value, same]


def masks(config: dict[str, Any]) -> list[float]:
    """What this rank draws for activations that its mp group has in common, and for those of its own."""
    job = typed(config)
    topology = Topology.initialize(job)
    topology.seed(job.seed, "dropout", 1, topology.replica)
    common = paddle.rand([1]).item()
    with topology.model_parallel_rng():
        own = paddle.rand([1]).item()
    return [common, own, paddle.rand([1]).item()]


def go_on(config: dict[str, Any], data: dict[str, Any], folder: str, first: int, last: int) -> list[float]:
    """Losses of steps ``first`` to ``last``, from the newest checkpoint in ``folder`` to a new one."""
    job = typed(config)
    topology = Topology.initialize(job)
    engine = Trainer(job, topology)
    if first > 1:
        found = checkpoint.load_or_fail(Path(folder), print, topology)
        engine.load(found.model(), found.optimizer(), found.state)
    samples = TokenDataset(job, DatasetInfo.from_plain(data), Split.train)
    losses = [engine.step(n, samples).loss for n in range(first, last + 1)]
    model, slots, rest = engine.state()
    saver = checkpoint_saver.Saver(Path(folder), 9, print, topology.rank, world_size(job))
    topology.all_reduce_sum(0.0)  # the first rank clears leftovers before another one begins
    saver.submit(checkpoint_saver.CheckpointShard(last, model, slots, {"step": last, "config": config, **rest}))
    assert saver.wait() is None
    topology.all_reduce_sum(0.0)
    return losses


def share(config: dict[str, Any], folder: str) -> list[int]:
    """The step that this rank resumes from, the bytes it reads for it, and those that it would give to the next."""
    job = typed(config)
    topology = Topology.initialize(job)
    engine = Trainer(job, topology)
    found = checkpoint.load_or_fail(Path(folder), print, topology)
    count, real = [0], shard_files.CheckpointReader.read

    def counted(self: shard_files.CheckpointReader, name: str, where: Any) -> Any:
        array = real(self, name, where)
        count[0] += array.nbytes
        return array

    shard_files.CheckpointReader.read = counted  # type: ignore[method-assign]
    engine.load(found.model(), found.optimizer(), found.state)
    given = sum(piece.array.nbytes for pieces in engine.state()[:2] for piece in pieces.values())
    return [found.state["step"], count[0], given]


def late(config: dict[str, Any], seconds: float) -> float:
    """A sum that the last rank comes late to."""
    topology = Topology.initialize(typed(config))
    if topology.rank == 1:
        time.sleep(seconds)
    return topology.all_reduce_sum(1.0)[0]


def quits(config: dict[str, Any]) -> str:
    """What the others hear when the last rank ends instead of coming to a sum."""
    topology = Topology.initialize(typed(config))
    if topology.rank == 1:
        return ""
    try:
        topology.all_reduce_sum(1.0)
    except ConnectionError as error:
        return str(error)
    return "nothing"


def write(config: dict[str, Any], prompts: list[str], size: int) -> list[list[str]]:
    """Texts for prompts, ``size`` of them at a time on each replica."""
    empty = DatasetInfo([], "", None, None, None, 0)
    job = Job(typed(config), empty, Path(), [])
    topology = Topology.initialize(job.config)
    writer, sampling = Generator.of(job, topology), Sampling.of(job.config.generate, job.config.seed)
    batches = in_batches(writer, topology, prompts, sampling, size, lambda piece: None, lambda: True)
    return [[text.text for text in texts] for batch in batches for texts in batch]


def measured(config: dict[str, Any]) -> list[dict[str, float]]:
    """The sums over what ``tests/test_evaluate.py`` measures, as every rank knows them."""
    from test_evaluate import SENTENCES, TOKENS

    job = typed(config)
    engine = Trainer(job, Topology.initialize(job))
    return [vars(engine.evaluator.totals(rows, 2)) for rows in (TOKENS, SENTENCES)]
