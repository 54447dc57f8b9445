"""How long a step takes on a stated device, and what a run then costs.

Matrix products run at ``device.efficiency`` of the peak, everything between them at the rate of the device's memory,
exchanges at that of the links (``communication``), one after the other. A pipeline adds its bubble. Nothing is said
of a device whose peak for the element type, memory bandwidth or links are not stated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gpt.config.derived import accumulate_steps, global_batch_size, micro_batch_size, peak, world_size
from gpt.config.optimizers import OPTIMIZERS
from gpt.config.rules import missing_device_keys
from gpt.config.schema import Config, Recompute
from gpt.config.task_schemas import DeviceSpec
from gpt.plan import flops as flop_counts
from gpt.plan.communication import (
    dp_bytes,
    head_bytes,
    hop_bytes,
    layer_bytes,
    link,
    sharding_bytes,
    sp_bytes,
    tied_bytes,
)
from gpt.plan.devices import of_rank
from gpt.plan.memory import element_size, flash, on_cpu


@dataclass(frozen=True)
class StageTimes:
    """Seconds. Lists have an entry per virtual stage in the order of the layers: stage k runs on rank k mod p.

    Attributes:
        forward: of one micro batch, exchanges within the stage included.
        backward: the same, with what is recomputed.
        send: one hop of activations, or of their gradients, to the neighbour.
        reduce: exchange of gradients and updated parameters at the end of the step.
        update: the optimizer.
    """

    forward: list[float]
    backward: list[float]
    send: float
    reduce: float
    update: float


@dataclass(frozen=True)
class Cost:
    """Of a step, in seconds, on the slowest rank; ``bubble`` and ``exposed`` are what is not computing."""

    seconds: float
    compute: float
    exposed: float
    bubble: float
    tokens: int
    ranks: int
    model_flops: float
    hardware_flops: float
    peak: float

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks."""
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs (causal) over what the peaks of all ranks could do in the time."""
        return self.model_flops / (self.seconds * self.ranks * self.peak)

    @property
    def hfu(self) -> float:
        """The same with what is recomputed."""
        return self.hardware_flops / (self.seconds * self.ranks * self.peak)


def stage_times(config: Config, device: DeviceSpec | None = None) -> StageTimes | None:
    """Of every virtual stage; None if the device does not state what is needed (``missing``).

    Args:
        config: of the job.
        device: instead of ``config.device``.
    """
    config = replace(config, device=device) if device else config
    own = of_rank(config)
    rate = peak(own, config.precision.dtype)
    if missing_device_keys(config) or rate is None or own.bandwidth_gb_s is None:
        return None
    flops, memory = rate * own.efficiency, own.bandwidth_share * 1e9 * own.bandwidth_gb_s
    p, tokens = config.parallel, config.data.seq_len * micro_batch_size(config)
    layers = config.model.layers // (p.pp_degree * p.virtual_pp_degree)
    mp = link(config, "mp")[0] or 1.0
    fetch = _seconds(stage3_bytes(config), link(config, "sharding")[0])
    forward, backward = [], []
    for first in range(0, config.model.layers, layers):
        there = back = 0.0
        for how, number in flop_counts.kinds(config, list(range(first, first + layers))).items():
            ahead, after = _block(config, how, flops, memory, tokens)
            travel, every = (layer_bytes(config, some) / mp for some in (Recompute.none, how))
            there += number * (ahead + travel / 2 + fetch)
            back += number * (after + every - travel / 2 + 2 * fetch)
        forward.append(there)
        backward.append(back)
    edge = head_bytes(config) / mp
    look_up = tokens * 4 * config.model.hidden * element_size(config) / memory
    forward[0] += look_up + edge
    backward[0] += look_up
    ahead, again = _head(config, flops, memory, tokens)
    forward[-1] += ahead
    backward[-1] += 2 * ahead + again + edge
    return StageTimes(forward, backward, _hop(config), _reduce(config), _update(config, memory))


def stage3_bytes(config: Config) -> float:
    """Sent per block and pass at sharding stage 3; the gradients' way is as long."""
    p = config.parallel
    if p.sharding_degree == 1 or p.sharding_stage < 3:
        return 0.0
    return (p.sharding_degree - 1) / p.sharding_degree * flop_counts.block_elements(config) * element_size(config)


def _seconds(sent: float, rate: float | None) -> float:
    return sent / rate if rate else 0.0


@dataclass(frozen=True)
class _Passes:
    """Bytes per token that a block reads and writes between its matrix products, forward and backward."""

    forward: float
    backward: float


def _block(config: Config, how: Recompute, flops: float, memory: float, tokens: int) -> tuple[float, float]:
    """Seconds of a block's forward and of its backward pass."""
    p, causal = config.parallel, flash(config) or on_cpu(config)
    product = flop_counts.forward_flops(config, causal=causal) / p.mp_degree / flops
    again = flop_counts.recomputed_flops(config, how, causal=causal) / p.mp_degree / flops
    passes, matrix = _passes(config), _matrix_passes(config)
    if how is Recompute.full:
        again += passes.forward / memory
    elif how is not Recompute.none:
        again += matrix.forward / memory
    return tokens * (product + passes.forward / memory), tokens * (2 * product + passes.backward / memory + again)


def _passes(config: Config) -> _Passes:
    """All of a block, in units of h and f: what is read and what is written.

    Forward: LayerNorm 2 h, its linears' bias h each, dropout 2 h and residual sum 3 h, twice; bias of q, k, v and their
    split 12 h, GELU and its bias 4 f. Backward: LayerNorm 3 h, bias sum h, dropout 2 h, sum of the stream's gradients
    3 h, twice; q, k, v 9 h; GELU 3 f and its bias f. With sequence parallel the mp ranks share out what comes twice.
    """
    m, p, size = config.model, config.parallel, element_size(config)
    alone = p.mp_degree if p.sequence_parallel else 1
    twice = (18 * size + 2 * (m.dropout > 0)) * m.hidden / alone
    forward = twice + (12 * m.hidden + 4 * m.ffn) * size / p.mp_degree
    backward = twice + (9 * m.hidden + 4 * m.ffn) * size / p.mp_degree
    matrix = _matrix_passes(config)
    return _Passes(forward + matrix.forward, backward + matrix.backward)


def _matrix_passes(config: Config) -> _Passes:
    """Over the attention matrix, which FlashAttention never has: softmax 2, backward 3, and dropout 2 with its mask."""
    if flash(config):
        return _Passes(0.0, 0.0)
    m, size = config.model, element_size(config)
    elements = m.heads * config.data.seq_len / (2 if on_cpu(config) else 1) / config.parallel.mp_degree
    dropout = (2 * size + 1) * (m.attention_dropout > 0)
    return _Passes((2 * size + dropout) * elements, (3 * size + dropout) * elements)


def _head(config: Config, flops: float, memory: float, tokens: int) -> tuple[float, float]:
    """Of the head with its loss: logits are written, read as float32, and become probabilities."""
    size, mp = element_size(config), config.parallel.mp_degree
    product = flop_counts.head_flops(config) / mp / flops
    passes = flop_counts.head_flops(config) / 2 / config.model.hidden / mp * (2 * size + 16) / memory
    again = product + passes if config.model.loss_chunk and not on_cpu(config) else 0.0
    return tokens * (product + passes), tokens * again


def _hop(config: Config) -> float:
    return _seconds(hop_bytes(config), link(config, "pp")[0])


def _reduce(config: Config) -> float:
    """Gradients and updated parameters at the end of a step; at sharding stages 2 and 3 also after micro batches."""
    p = config.parallel
    biggest = max(part.elements for part in flop_counts.stage_parameters(config))
    shared = sharding_bytes(config, biggest) if p.sharding_degree > 1 else 0.0
    if p.sharding_stage == 3 and p.sharding_degree > 1:  # the rest is in the passes of the blocks
        shared = max(0.0, shared - 3 * stage3_bytes(config) * config.model.layers * accumulate_steps(config))
    return (
        _seconds(dp_bytes(config, biggest), link(config, "dp")[0])
        + _seconds(shared, link(config, "sharding")[0])
        + _seconds(sp_bytes(config), link(config, "mp")[0])
        + _seconds(tied_bytes(config), link(config, "pp")[0])
    )


def _update(config: Config, memory: float) -> float:
    """Seconds of the update: gradient, weight and moments read, the latter two written; norm and clip once more."""
    size = element_size(config)
    elements = max(part.owned for part in flop_counts.stage_parameters(config))
    slots = 8 * OPTIMIZERS[config.optimizer.name].moments + (8 if size == 4 else 12)
    return elements * (slots + 3 * size) / memory


def pipeline_bubble(config: Config) -> float:
    """Share of a step that a stage waits: (p - 1) / (v m + p - 1) for p stages, m micro batches, v chunks."""
    p, v = config.parallel.pp_degree, config.parallel.virtual_pp_degree
    return (p - 1) / (v * accumulate_steps(config) + p - 1)


def cost(config: Config) -> Cost | None:
    """Of a step of ``config`` on ``config.device``; None if that does not state what is needed.

    A pipeline of p stages with m micro batches and v chunks takes as long as its slowest rank computes, (p - 1) / v
    passes of a rank more at start and end (Narayanan et al., 2021, section 2.2), and two hops per chunk and micro
    batch.
    """
    p, micros = config.parallel, accumulate_steps(config)
    times, rate = stage_times(config), peak(of_rank(config), config.precision.dtype)
    if times is None or rate is None:
        return None
    stages, v = p.pp_degree, p.virtual_pp_degree
    ranks = [sum(times.forward[k::stages]) + sum(times.backward[k::stages]) for k in range(stages)]
    slowest, mean = max(ranks), sum(ranks) / stages
    bubble = (stages - 1) / v * mean + micros * (slowest - mean) if stages > 1 else 0.0
    hops = 2 * times.send * (micros * v + stages - 1) if stages > 1 else 0.0
    tokens = global_batch_size(config) * config.data.seq_len
    inside = _inside(config)
    busy = micros * mean
    return Cost(
        seconds=busy + bubble + hops + times.reduce + times.update,
        compute=busy - inside + times.update,
        exposed=inside + hops + times.reduce,
        bubble=bubble,
        tokens=tokens,
        ranks=world_size(config),
        model_flops=tokens * flop_counts.flops_per_token(config),
        hardware_flops=tokens * flop_counts.hardware_flops_per_token(config),
        peak=rate,
    )


def _inside(config: Config) -> float:
    """Exchanges within passes, of a mean rank: over mp, and at sharding stage 3."""
    p, micros = config.parallel, accumulate_steps(config)
    layers = config.model.layers
    found = 0.0
    if p.mp_degree > 1:
        kinds = flop_counts.kinds(config, list(range(layers)))
        every = sum(number * layer_bytes(config, how) for how, number in kinds.items())
        found += _seconds((every + 2 * head_bytes(config)) * micros / p.pp_degree, link(config, "mp")[0])
    return found + _seconds(3 * stage3_bytes(config) * layers * micros / p.pp_degree, link(config, "sharding")[0])
