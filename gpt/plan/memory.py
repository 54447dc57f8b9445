"""Bytes on a rank. h hidden, f ffn, s sequence, a heads, V rows of the table, e bytes of an element.

State is exact. What a block keeps is listed tensor by tensor, for the two sets of operations that this project has:
Paddle's own on an accelerator, which add up to Korthikanti et al. 2022, table 2, and our kernels on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpt.config.cluster import Device
from gpt.config.derived import accumulate_steps, micro_batch_size, padded_vocab
from gpt.config.optimizers import OPTIMIZERS
from gpt.config.schema import Config, DType, Recompute
from gpt.config.task_schemas import Attention
from gpt.plan import flops, pipeline_schedule

QUERY_BLOCK = 256  # of gpt.model.cpu_kernels, whose attention keeps what is left of the diagonal block and that
BUCKET_ELEMENTS = 1 << 25  # of gpt.parallel.gradients
FP32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank of a pipeline stage.

    Attributes:
        weights: in the type of the computation.
        gradients: all of a step.
        optimizer: float32 master weights and moments.
        activations: kept by all micro batches in flight.
        logits: of the head and its loss, on the last stage.
        again: most that one block needs at once in its backward pass; with recomputation, all of it.
        gathered: parameters at sharding stage 3 that are there while a step uses them: those outside blocks.
        buffers: flat copies of gradients and updates that travel, after the last backward pass.
        host: of an offloaded optimizer, in the memory of the host.
        early: whether gradients are there already when most activations are.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    again: int
    gathered: int
    buffers: int
    host: int
    early: bool

    @property
    def state(self) -> int:
        """Weights, gradients, optimizer."""
        return self.weights + self.gradients + self.optimizer

    @property
    def between(self) -> int:
        """What is there between steps."""
        return self.weights + self.optimizer

    @property
    def total(self) -> int:
        """At the fullest moment: at the last forward pass in flight, or when gradients travel."""
        working = self.activations + max(self.logits, self.again) + self.gathered
        inside = self.gradients + working if self.early else max(working, self.gradients + self.again)
        return self.between + max(inside, self.gradients + self.buffers)

    @property
    def working(self) -> int:
        """What the fullest moment adds to state and activations."""
        return max(0, self.total - self.state - self.activations)


def memory(config: Config) -> Memory:
    """Of the fullest stage: the first, the second or the last if all have equal blocks; behind it less is in flight."""
    p, parts = config.parallel, flops.stage_parameters(config)
    uniform = p.sharding_degree == 1 and not config.model.no_recompute_layers
    asked = {0, min(1, p.pp_degree - 1), p.pp_degree - 1} if uniform else range(p.pp_degree)
    return max((_stage(config, number, parts[number]) for number in sorted(asked)), key=lambda need: need.total)


def stages(config: Config) -> list[Memory]:
    """For every pipeline stage, the first first."""
    return [_stage(config, number, part) for number, part in enumerate(flops.stage_parameters(config))]


def element_size(config: Config) -> int:
    """Bytes of a weight, a gradient, an activation."""
    return FP32 if config.precision.dtype is DType.fp32 else 2


def in_flight(config: Config, stage: int) -> int:
    """Micro batches times chunks whose activations a stage holds at once under Fleet's schedule."""
    p, micros = config.parallel, accumulate_steps(config)
    return pipeline_schedule.in_flight(_order(config), stage, p.pp_degree, micros, p.virtual_pp_degree)


def _order(config: Config) -> pipeline_schedule.PipelineSchedule:
    p = config.parallel
    return pipeline_schedule.of_fleet(p.pp_degree, accumulate_steps(config), p.virtual_pp_degree)


def _stage(config: Config, number: int, part: flops.Stage) -> Memory:
    p, size = config.parallel, element_size(config)
    split = p.sharding_stage if p.sharding_degree > 1 else 1
    moments = OPTIMIZERS[config.optimizer.name].moments
    slots = FP32 * (moments if size == FP32 else moments + 1) * part.owned
    away = config.optimizer.offload
    tokens = config.data.seq_len * micro_batch_size(config)
    held = in_flight(config, number)
    first, last = number == 0, number == p.pp_degree - 1
    passing = size * part.widest  # a tensor's gradient is there before it is added to that of other micro batches
    early = held < accumulate_steps(config) * p.virtual_pp_degree
    come = size * flops.block_elements(config) * (p.sharding_degree - 1) // p.sharding_degree if split == 3 else 0
    losses = _loss(config, tokens) if last else 0
    if last and on_cpu(config) and p.mp_degree == 1:  # the head's gradients, made in the forward pass, stay to its end
        come += losses
    more = accumulate_steps(config) - 1 if _order(config) is pipeline_schedule.PipelineSchedule.f_then_b else 0
    return Memory(
        weights=size * (part.owned if split >= 3 else part.elements),
        gradients=size * (part.owned if split >= 2 else part.elements),
        optimizer=0 if away else slots,
        activations=round(tokens * _activations(config, number, held, first=first, last=last)) + more * losses,
        logits=_logits(config, tokens) if last else 0,
        again=round(tokens * _backward_peak(config, number)) + come + (passing if early or split > 1 else 0),
        gathered=size * part.fetched if split == 3 else 0,
        buffers=_buffers(config, part),
        host=(slots + FP32 * part.owned * (size == FP32) + FP32 * part.owned) if away else 0,
        early=early,
    )


def _activations(config: Config, number: int, held: int, *, first: bool, last: bool) -> float:
    """Bytes per token of a micro batch that a stage keeps, over all ``held`` chunks in flight."""
    m, p, size = config.model, config.parallel, element_size(config)
    layers = flops.layers_of_stage(m.layers, p.pp_degree, p.virtual_pp_degree, number)
    kinds = flops.kinds(config, layers)
    per_chunk = sum(number * block(config, how) for how, number in kinds.items()) / p.virtual_pp_degree
    between = size * m.hidden * _outside(config)
    if p.pp_degree > 1:  # the schedule keeps what a stage sends; what it receives is the first block's input
        per_chunk += between * (not last or p.virtual_pp_degree > 1)
        per_chunk += between * (on_cpu(config) and not first and m.recompute is not Recompute.full)
    mask = m.hidden * (m.dropout > 0) if first else 0.0  # after the embedding
    norm = between + size * m.hidden if last else 0.0  # the last one's input and output
    return held * per_chunk + (mask + norm) * max(1, held / p.virtual_pp_degree)


def on_cpu(config: Config) -> bool:
    """Whether the ranks run this project's CPU kernels."""
    return config.cluster.device is Device.cpu or config.device.name == "cpu"


def flash(config: Config) -> bool:
    """Whether attention keeps no probabilities; FlashAttention has no float32."""
    return config.device.attention is Attention.flash and config.precision.dtype is not DType.fp32


def _outside(config: Config) -> float:
    """What a rank has of an activation between the split linears."""
    return 1 / config.parallel.mp_degree if config.parallel.sequence_parallel else 1.0


def block(config: Config, recompute: Recompute) -> float:
    """Bytes per token that one block keeps for its backward pass."""
    m, size, outside, mp = config.model, element_size(config), _outside(config), config.parallel.mp_degree
    h, f = size * m.hidden, size * m.ffn
    if recompute is Recompute.full:
        return h * outside  # its input
    norms = 2 * h * outside  # their inputs, on a CPU the normalised rows
    linears = 2 * h  # inputs of the column linears; under sequence parallel Fleet keeps them gathered
    masks = 2 * m.hidden * outside * (m.dropout > 0)
    mlp = f / mp * (3 if on_cpu(config) else 2)  # in and out of the GELU; on a CPU its tanh too
    if recompute is Recompute.full_attn:
        return norms + (h + h * outside) + masks + mlp
    attention = 4 * h / mp  # q, k, v and their mix
    if on_cpu(config) and config.parallel.sequence_parallel:
        attention += h / mp  # turned for the next linear
    probabilities = 0.0 if recompute is Recompute.core_attn else _probabilities(config)
    return norms + linears + masks + mlp + attention + probabilities


def _probabilities(config: Config) -> float:
    """Of the attention matrix, per token."""
    m, size, mp = config.model, element_size(config), config.parallel.mp_degree
    dropped = m.attention_dropout > 0
    if on_cpu(config):
        return _causal_columns(config.data.seq_len) * m.heads / mp * (FP32 + dropped)
    if flash(config):
        return FP32 * m.heads / mp  # the rows' sums
    return config.data.seq_len * m.heads / mp * (size + (1 + size) * dropped)


def _causal_columns(length: int) -> float:
    """Mean columns of a row that attention in query blocks computes."""
    ends = [min(start + QUERY_BLOCK, length) for start in range(0, length, QUERY_BLOCK)]
    return sum((end - start) * end for start, end in zip(range(0, length, QUERY_BLOCK), ends, strict=True)) / length


def _backward_peak(config: Config, number: int) -> float:
    """Bytes per token of what one block's backward pass has at once, beyond what was kept."""
    m, p, size = config.model, config.parallel, element_size(config)
    layers = flops.layers_of_stage(m.layers, p.pp_degree, p.virtual_pp_degree, number)
    h, f, mp = size * m.hidden, size * m.ffn, p.mp_degree
    whole = block(config, Recompute.none)
    # The gradient of the stream and of a side of the GELU. When it is the attention's turn, what the MLP kept is gone.
    scores = QUERY_BLOCK * m.heads / mp * FP32 if on_cpu(config) else _probabilities(config)
    mlp = (3 if on_cpu(config) else 2) * f / mp + h * (1 + _outside(config))
    flowing = 2 * h + max(f / mp, 8 * h / mp + scores - mlp)
    return flowing + max(whole - block(config, how) for how in flops.kinds(config, layers))


def _logits(config: Config, tokens: int) -> int:
    """The head and its loss: per row and column what exists at once, 8 bytes on an accelerator (float32 and softmax).

    On a CPU the gradients are made in the forward pass: of the input, and of the table (twice if it is in chunks).
    """
    m, mp = config.model, config.parallel.mp_degree
    rows, columns = min(m.loss_chunk or tokens, tokens), padded_vocab(config) / mp
    if not on_cpu(config):
        return round(8 * rows * columns)
    if mp > 1:
        return round(4 * FP32 * rows * columns)
    parts = 1 if rows == tokens else 2
    return round(FP32 * (rows * columns + parts * (columns + tokens) * m.hidden))


def _loss(config: Config, tokens: int) -> int:
    """What a loss keeps for its backward pass: on a CPU its gradients, else probabilities unless it is in chunks."""
    m, mp = config.model, config.parallel.mp_degree
    if on_cpu(config) and mp == 1:
        return FP32 * (padded_vocab(config) + tokens) * m.hidden
    return 0 if m.loss_chunk else FP32 * tokens * padded_vocab(config) // mp


def _buffers(config: Config, part: flops.Stage) -> int:
    """Flat copies of a gradient bucket, there and back; on an accelerator also the norm's float32 squares."""
    p, size = config.parallel, element_size(config)
    split = p.sharding_stage if p.sharding_degree > 1 else 0
    summed = part.owned if split >= 2 else part.elements if p.dp_degree > 1 or split else 0
    given = part.owned if split in (1, 2) else 0
    travels = max(summed if p.dp_degree > 1 or split == 1 else 0, given)
    bucket = max(min(part.largest, travels), min(travels, BUCKET_ELEMENTS))
    return max(2 * size * bucket, 0 if on_cpu(config) else 2 * FP32 * part.largest)
