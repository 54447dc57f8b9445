"""Train: restore, step, record, evaluate, save, and close with a sample."""

from __future__ import annotations

import math
from pathlib import Path
from signal import Signals as Signal
from typing import Any

from gpt.config.derived import global_batch_size, one_rank, plain, world_size
from gpt.config.parameters import parameter_shapes
from gpt.config.task_schemas import Split
from gpt.data.dataset import TokenDataset
from gpt.parallel.topology import Topology
from gpt.runs.checkpoint import checkpoint, saver
from gpt.runs.run_dir import Job, truncate_metrics
from gpt.tasks.workers.generate import sample_text
from gpt.train.loggers import base, build
from gpt.train.metrics import Meter, peak_memory, validation
from gpt.train.trainer import Trainer
from gpt.utils import heartbeat
from gpt.utils import signals as utils_signals
from gpt.utils.console import say
from gpt.utils.errors import UserError
from gpt.utils.files import write_json
from gpt.utils.machine import versions
from gpt.utils.signals import GuardError, Signals

ALONE_BYTES = 4 << 30  # of float32 weights that one rank may read whole for the closing sample


def run(job: Job, signals: Signals) -> int:
    """Train until ``trainer.max_steps``, a signal or the guard; returns the exit code."""
    session, trainer = Session(job), job.config.trainer
    outcome, code, why = "done", utils_signals.DONE, ""
    try:
        while not session.stopped(signals) and session.step < trainer.max_steps:
            record = session.train()

            if session.val and session.due(trainer.eval_every):
                record |= session.evaluate()
            session.publish(record)

            if session.due(trainer.save_every):
                session.save()
        if session.stopped_by:
            say(
                f"stopped by {session.stopped_by.name} after step {session.step:,}; the same command goes on from there"
            )
            outcome, code = "stopped", 128 + session.stopped_by
            session.save_unless_saved()
    except GuardError as error:
        say(f"STOPPED: {error}")
        outcome, code, why = "guard", utils_signals.GUARD, str(error)
    if (unsaved := session.saver.wait()) and outcome == "done":
        outcome, code, why = "failed", utils_signals.FAILED, f"the checkpoint could not be written: {unsaved}"
    if outcome == "done":
        session.sample()
    session.close(outcome, code, why)
    return code


class Session:
    """A training run in progress. Rank 0 alone writes files."""

    def __init__(self, job: Job) -> None:
        config = job.config
        heartbeat.beat(0, "connect")
        self.topology = Topology.initialize(config)
        heartbeat.beat(0, "build")
        self.job = job
        self.samples = TokenDataset(config, job.data, Split.train)
        self.val = TokenDataset(config, job.data, Split.val) if config.data.split[1] > 0 else None
        self.trainer = Trainer(config, self.topology)
        self.step = restore(job, self.trainer)
        self.first_step = self.step
        self.stopped_by: Signal | None = None
        self.sinks: list[base.Logger] = []
        if self.topology.rank == 0:
            truncate_metrics(job.run_dir, self.step)
            (job.run_dir / "result.json").unlink(missing_ok=True)
            self.jsonl, self.sinks = build.loggers(job)
        keep = config.trainer.keep_checkpoints
        self.saver = saver.Saver(job.run_dir, keep, say, self.topology.rank, world_size(config))
        self.last_announced_step: int | None = None
        self.meter = Meter(config)
        self.last: dict[str, Any] = {}
        self.last_validation: dict[str, float] = {}
        epochs = self.samples.epochs(config.trainer.max_steps * global_batch_size(config))
        shares = [part.weight / sum(p.weight for p in job.data.parts) for part in job.data.parts]
        say(
            f"training from step {self.step:,} to {config.trainer.max_steps:,}: "
            + "; ".join(
                f"{epoch:.3g} epoch(s) of the training split"
                + (f" of {Path(part.path).name}, {share:.4g} of the samples" if len(epochs) > 1 else "")
                for epoch, share, part in zip(epochs, shares, job.data.parts, strict=True)
            )
        )

    def stopped(self, signals: Signals) -> bool:
        """Return whether any rank received a signal: all leave the loop after the same step."""
        kinds = (Signal.SIGTERM, Signal.SIGINT)
        counts = self.topology.all_reduce_sum(*(float(signals.received is kind) for kind in kinds))
        self.stopped_by = next((kind for kind, count in zip(kinds, counts, strict=True) if count), None)
        return self.stopped_by is not None

    def train(self) -> dict[str, Any]:
        """Run one step; return its record."""
        self.meter.start()
        result = self.trainer.step(self.step + 1, self.samples)
        self.step += 1
        if self.shown():  # the same on every rank
            self.meter.memory_peak = self.topology.all_reduce_max(peak_memory(self.topology.device))
        self.last = self.meter.record(self.step, result)
        return self.last

    def evaluate(self) -> dict[str, float]:
        """Evaluate on the validation split; return the figures for the record."""
        assert self.val
        heartbeat.beat(self.step, "evaluate")
        loss = self.trainer.evaluate(self.val, self.job.config.trainer.eval_batches)
        self.last_validation = validation(loss, self.job.data)
        return self.last_validation

    def publish(self, record: dict[str, Any]) -> None:
        """Send the step's record to all loggers."""
        for sink in self.sinks:
            sink.write(record)
        self._announce_checkpoint()
        if "val/loss" in record or self.shown():
            self.meter.show(record)

    def _announce_checkpoint(self) -> None:
        """Tell the loggers of a new checkpoint, which is complete some steps after its save began."""
        if (step := self.saver.saved_step) is not None and step != self.last_announced_step:
            self.last_announced_step = step
            for sink in self.sinks:
                sink.saved(step)

    def shown(self) -> bool:
        """Return whether the step has a line on the terminal even without an evaluation."""
        return self.step == self.first_step + 1 or self.due(self.job.config.trainer.log_every)

    def due(self, every: int) -> bool:
        """Return whether an action of every ``every`` steps (0: never), and of the last one, is due."""
        return self.step == self.job.config.trainer.max_steps or (every > 0 and self.step % every == 0)

    def save(self) -> None:
        """Copy this rank's shards of the state and write them in the background."""
        heartbeat.beat(self.step, "save")
        model, optimizer, rest = self.trainer.state()
        if self.topology.rank == 0:
            self.jsonl.sync()
        tokenizer = Path(self.job.data.tokenizer) if self.job.data.tokenizer else None
        self.saver.submit(saver.CheckpointShard(self.step, model, optimizer, {**self._about(), **rest}, tokenizer))

    def save_unless_saved(self) -> None:
        """Save, unless this step's checkpoint exists."""
        self.saver.wait()
        unsaved = self.step > self.first_step and self.saver.saved_step != self.step
        if self.topology.all_reduce_sum(float(unsaved and self.topology.rank == 0))[0]:
            self.save()

    def sample(self) -> None:
        """Continue the prompt on rank 0, which reads a model that is split over ranks from the last checkpoint."""
        heartbeat.beat(self.step, "sample")
        if self.topology.rank > 0:
            return
        trainer = self.trainer
        if not trainer.strategy.has_full_model:
            size = self._parameters() * 4
            if size > ALONE_BYTES:
                say(
                    f"no sample: the whole model has {size / 2**30:,.1f} GiB of weights; "
                    "task=generate continues a prompt from the checkpoint"
                )
                return
            alone = one_rank(self.job.config)
            trainer = Trainer(alone, Topology(alone.parallel, self.topology.device), train=False)
            trainer.load(checkpoint.Checkpoint(checkpoint.folder_of(self.job.run_dir, self.step)).model(), None, {})
        if sample_text(self.job, trainer, self.step):
            for sink in self.sinks:
                sink.sampled(self.step)

    def close(self, outcome: str, code: int, why: str) -> None:
        """End the logs and write ``result.json``, last."""
        if self.topology.rank > 0:
            return
        self._announce_checkpoint()
        for sink in self.sinks:
            sink.close(outcome, code, why)
        result = {"status": outcome, "step": self.step, "tokens": self.step * self.meter.tokens_per_step}
        result["train/loss"] = self.last.get("train/loss")
        result |= self.last_validation
        result["parameters"] = self._parameters()
        if self.meter.seconds:
            result |= self.meter.rates(self.meter.typical_seconds())
            result["memory_peak_gib"] = self.last["memory_peak_gib"]
        write_json(self.job.run_dir / "result.json", result)

    def _parameters(self) -> int:
        return sum(math.prod(shape) for shape in parameter_shapes(self.job.config).values())

    def _about(self) -> dict[str, Any]:
        """Return the metadata of a checkpoint. Dropout and data order are functions of seed and step."""
        samples = self.step * global_batch_size(self.job.config)
        return {
            "step": self.step,
            "samples": samples,
            "tokens": samples * self.job.config.data.seq_len,
            "data_fingerprint": self.job.data.fingerprint,
            "data": self.job.data.plain(),
            "config": plain(self.job.config),
            "versions": versions(),
        }


def restore(job: Job, trainer: Trainer) -> int:
    """Load the newest valid checkpoint of the run and return its step, or 0 for a fresh start.

    A fresh start takes its weights from ``checkpoint=``, if given; moments, learning rate and data order are those of
    step 0.

    Raises:
        UserError: the checkpoint is of another model or other data.
    """

    def warn(line: str) -> None:
        say(f"WARNING: {line}")

    own = source = checkpoint.latest_valid(job.run_dir, warn, trainer.topology)
    if own and own.state["data_fingerprint"] != job.data.fingerprint:
        raise UserError(f"{own.path}: trained on other data; start afresh with trainer.resume=never")
    if own is None and job.config.checkpoint:
        source = checkpoint.load_or_fail(Path(job.config.checkpoint), warn, trainer.topology)
    if source is None:
        return 0
    try:
        trainer.load(source.model(), own.optimizer() if own else None, own.state if own else {})
    except ValueError as error:
        raise UserError(f"{source.path}: {error}") from error
    step = int(source.state["step"])
    if own:
        say(f"resuming from {own.path.name}")
        return step
    say(f"starting with the weights of {source.path} (its step {step:,}), at step 0 with fresh moments")
    return 0
