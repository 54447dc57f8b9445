"""Train: restore, step, record, evaluate, save, and close with a sample."""

from __future__ import annotations

import math
import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import paddle

from gpt import checkpoint, guard, log, plan
from gpt.config import Config, Device, Split, UserError, global_batch_size, plain
from gpt.data.corpus import Prepared
from gpt.data.samples import Samples
from gpt.engine import Engine
from gpt.files import write_json
from gpt.guard import GuardError, Signals
from gpt.log import say
from gpt.runs import Job, truncate_metrics, versions
from gpt.tasks.generate import sample_text
from gpt.topology import Topology


def run(job: Job, signals: Signals) -> int:
    """Train until ``trainer.max_steps``, a signal or the guard; returns the exit code."""
    config, trainer = job.config, job.config.trainer
    topology = Topology.connect(config)
    train = Samples(config, job.data, Split.train)
    val = Samples(config, job.data, Split.val) if _evaluates(job) else None
    engine = Engine(config, topology)

    start = restore(job, engine)
    truncate_metrics(job.run_dir, start)
    (job.run_dir / "result.json").unlink(missing_ok=True)
    jsonl, sinks = log.sinks(job)
    saver = checkpoint.Saver(job.run_dir, trainer.keep_checkpoints, say)
    meter = Meter(config)
    epochs = ", ".join(f"{e:.3g}" for e in train.epochs(trainer.max_steps * global_batch_size(config)))
    say(f"training from step {start:,} to {trainer.max_steps:,}, {epochs} epoch(s) of {job.data.tokens:,} tokens")

    def save(step: int) -> None:
        model, optimizer, rest = engine.state()
        jsonl.sync()
        saver.submit(step, model, optimizer, {**_about(job, step), **rest}, _tokenizer(job))

    step, record, val_loss = start, {}, None
    outcome, code = "done", guard.DONE
    try:
        while step < trainer.max_steps and not signals.received:
            meter.start()
            result = engine.step(step + 1, train)
            step += 1
            record = meter.record(step, result.loss, result.lr, result.grad_norm, result.loss_scale)

            if val is not None and _due(step, trainer.eval_every, trainer.max_steps):
                val_loss = engine.evaluate(val, trainer.eval_batches)
                record |= validation(val_loss, job.data)
            for sink in sinks:
                sink.write(record)
            if "val/loss" in record or _due(step, trainer.log_every, trainer.max_steps):
                meter.show(record)

            if _due(step, trainer.save_every, trainer.max_steps):
                save(step)
        if signals.received:
            outcome, code = "stopped", signals.exit_code
            saver.wait()
            if step > start and saver.saved_step != step:
                save(step)
    except GuardError as error:
        outcome, code = "guard", guard.GUARD
        say(f"STOPPED: {error}")
    finally:
        unsaved = saver.wait()
    if unsaved and outcome == "done":
        outcome, code = "failed", guard.FAILED
    result_record = _result(job, engine, outcome, step, record, val_loss, meter)
    if outcome == "done":
        sample_text(job, engine, step)
    elif outcome == "stopped" and signals.received:
        say(f"stopped by {signals.received.name} after step {step:,}; the same command goes on from there")
    for sink in sinks:
        sink.close(outcome, code)
    write_json(job.run_dir / "result.json", result_record)
    return code


def restore(job: Job, engine: Engine) -> int:
    """Load the newest sound checkpoint, if any; returns its step, or 0 for a fresh start.

    Raises:
        UserError: the checkpoint is of another model or other data.
    """
    found = checkpoint.newest(job.run_dir, lambda line: say(f"WARNING: {line}"))
    if found is None:
        return 0
    if found.state["data_fingerprint"] != job.data.fingerprint:
        raise UserError(f"{found.path}: trained on other data; start afresh with trainer.resume=never")
    try:
        engine.load(found.model(), found.optimizer(), found.state)
    except ValueError as error:
        raise UserError(f"{found.path}: {error}") from error
    say(f"resuming from {found.path.name}")
    return int(found.state["step"])


def validation(loss: float, data: Prepared) -> dict[str, float]:
    """The record of an evaluation; bits per byte compare across tokenizers, losses do not."""
    record = {"val/loss": loss, "val/perplexity": math.exp(min(loss, 20.0))}
    if data.bytes_per_token:
        record["val/bits_per_byte"] = loss / math.log(2) / data.bytes_per_token
    return record


def peak_memory(device: Device) -> float:
    """Most memory so far, in GiB: of the process on a CPU, of the allocator on a GPU."""
    if device is Device.gpu:
        return float(paddle.device.cuda.max_memory_allocated()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Meter:
    """Times steps (data, forward, backward, update; not evaluation and saving) and makes their records."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.tokens_per_step = global_batch_size(config) * config.data.seq_len
        self.flops_per_token = plan.flops_per_token(config)
        name = paddle.device.cuda.get_device_name() if config.cluster.device is Device.gpu else "CPU"
        self.peak = plan.peak_flops(name, config.precision.dtype)
        self.seconds: list[float] = []
        self._began = 0.0

    def start(self) -> None:
        """A step begins."""
        self._began = time.perf_counter()

    def record(
        self, step: int, loss: float, lr: float, grad_norm: float, loss_scale: float | None
    ) -> dict[str, Any]:
        """The step has ended: its record."""
        seconds = time.perf_counter() - self._began
        self.seconds.append(seconds)
        rate = self.tokens_per_step / seconds
        record: dict[str, Any] = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "train/loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "seconds": seconds,
            "tokens_per_second": rate,
            "memory_peak_gib": round(peak_memory(self.config.cluster.device), 3),
        }
        if loss_scale is not None:
            record["loss_scale"] = loss_scale
        if self.peak:
            record["mfu"] = rate * self.flops_per_token / self.peak
        return record

    def typical_seconds(self) -> float:
        """Median time of a step, the first few left out: they warm up caches."""
        return statistics.median(self.seconds[3:] or self.seconds)

    def show(self, record: dict[str, Any]) -> None:
        """A plain line, unless the driver draws a live display from the records."""
        if os.environ.get("GPT_LIVE") and "val/loss" not in record:
            return
        last = self.config.trainer.max_steps
        left = (last - record["step"]) * self.typical_seconds()
        line = (
            f"step {record['step']:>{len(str(last))}}/{last}  loss {record['train/loss']:.4f}  lr {record['lr']:.3e}  "
            f"grad {record['grad_norm']:.3f}  {record['tokens_per_second']:,.0f} tok/s"
        )
        if "mfu" in record:
            line += f"  mfu {record['mfu']:.1%}"
        if "val/loss" in record:
            line += f"  val/loss {record['val/loss']:.4f}"
        say(f"{line}  eta {int(left // 3600)}:{int(left % 3600 // 60):02}:{int(left % 60):02}")


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _evaluates(job: Job) -> bool:
    return job.config.data.split[1] > 0


def _tokenizer(job: Job) -> Path | None:
    return Path(job.data.tokenizer) if job.data.tokenizer else None


def _about(job: Job, step: int) -> dict[str, Any]:
    """What a checkpoint says of itself besides the arrays. Dropout and data order are functions of seed and step."""
    size = global_batch_size(job.config)
    return {
        "step": step,
        "samples": step * size,
        "tokens": step * size * job.config.data.seq_len,
        "data_fingerprint": job.data.fingerprint,
        "data": job.data.plain(),
        "config": plain(job.config),
        "versions": versions(),
    }


def _result(
    job: Job, engine: Engine, status: str, step: int, record: dict[str, Any], val_loss: float | None, meter: Meter
) -> dict[str, Any]:
    tokens = step * meter.tokens_per_step
    result: dict[str, Any] = {"status": status, "step": step, "tokens": tokens}
    result["train/loss"] = record.get("train/loss")
    result |= validation(val_loss, job.data) if val_loss is not None else {}
    result["parameters"] = sum(int(p.size) for p in engine.parameters.values())
    if meter.seconds:
        result["tokens_per_second"] = meter.tokens_per_step / meter.typical_seconds()
        result["memory_peak_gib"] = record["memory_peak_gib"]
    return result
