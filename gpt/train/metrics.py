"""Metrics of a step and of an evaluation."""

from __future__ import annotations

import math
import os
import resource
import statistics
import time
from typing import Any

import paddle

from gpt.config.cluster import Device
from gpt.config.derived import global_batch_size, replicas, world_size
from gpt.config.schema import Config
from gpt.data.corpus import DatasetInfo
from gpt.plan import flops
from gpt.plan.devices import peak_here
from gpt.train.trainer import StepResult
from gpt.utils.console import say
from gpt.utils.launch_env import WorkerEnv

WARM_UP_STEPS = 3  # left out of the typical step: they fill caches


def validation(loss: float, data: DatasetInfo) -> dict[str, float]:
    """Return the record of an evaluation; bits per byte compare across tokenizers, losses do not."""
    record = {"val/loss": loss, "val/perplexity": math.exp(min(loss, 20.0))}
    if data.bytes_per_token:
        record["val/bits_per_byte"] = loss / math.log(2) / data.bytes_per_token
    return record


def peak_memory(device: Device) -> float:
    """Return the peak memory in GiB: of the process on a CPU, of the allocator on a GPU."""
    if device is Device.gpu:
        return float(paddle.device.cuda.max_memory_allocated()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Meter:
    """Times steps (data, forward, backward, update; not evaluation and saving) and makes their records.

    ``mfu`` is in a record only where the device's peak is known (``conf/device``); its FLOPs are
    ``gpt.plan.flops_per_token``.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.tokens_per_step = global_batch_size(config) * config.data.seq_len
        self.world, self.replicas = world_size(config), replicas(config)
        self.flops_per_token = flops.flops_per_token(config)
        name = paddle.device.cuda.get_device_name() if config.cluster.device is Device.gpu else "CPU"
        self.peak = peak_here(config, name)
        self.seconds: list[float] = []
        self.memory_peak = 0.0  # GiB on the fullest rank, as of the last line
        self._began = 0.0

    def start(self) -> None:
        """Start timing a step."""
        self._began = time.perf_counter()

    def record(self, step: int, result: StepResult) -> dict[str, Any]:
        """Stop timing a step and return its record."""
        seconds = time.perf_counter() - self._began
        self.seconds.append(seconds)
        rate = self.tokens_per_step / seconds
        record: dict[str, Any] = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "train/loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "seconds": seconds,
            **self.rates(seconds),
            "memory_peak_gib": round(self.memory_peak, 3),
        }
        if result.loss_scale is not None:
            record["loss_scale"] = result.loss_scale
        if self.peak:
            record["mfu"] = rate * self.flops_per_token / self.peak
        return record

    def rates(self, seconds: float) -> dict[str, float]:
        """Return tokens per second of all ranks; with several ranks also per device and per replica."""
        rate = self.tokens_per_step / seconds
        if self.world == 1:
            return {"tokens_per_second": rate}
        return {
            "tokens_per_second": rate,
            "tokens_per_second_per_device": rate / self.world,
            "tokens_per_second_per_replica": rate / self.replicas,
        }

    def typical_seconds(self) -> float:
        """Return the median time of a step after warm-up."""
        return statistics.median(self.seconds[WARM_UP_STEPS:] or self.seconds)

    def show(self, record: dict[str, Any]) -> None:
        """A plain line, unless the driver draws a live display from the records."""
        if WorkerEnv.from_env(os.environ).live and "val/loss" not in record:
            return
        last = self.config.trainer.max_steps
        left = int((last - record["step"]) * self.typical_seconds())
        figures = [
            f"step {record['step']:>{len(str(last))}}/{last}",
            f"loss {record['train/loss']:.4f}",
            f"lr {record['lr']:.3e}",
            "grad overflow" if record["grad_norm"] is None else f"grad {record['grad_norm']:.3f}",
            f"{record['tokens_per_second']:,.0f} tok/s",
        ]
        if self.world > 1:
            device, replica = (record[f"tokens_per_second_per_{of}"] for of in ("device", "replica"))
            figures[-1] += f" ({device:,.0f} per device, {replica:,.0f} per replica)"
        if "mfu" in record:
            figures.append(f"mfu {record['mfu']:.1%}")
        if "val/loss" in record:
            figures.append(f"val/loss {record['val/loss']:.4f}")
        say("  ".join([*figures, f"eta {left // 3600}:{left % 3600 // 60:02}:{left % 60:02}"]))
