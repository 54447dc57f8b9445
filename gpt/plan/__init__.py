"""Parameters, FLOPs, bytes, pipeline bubble: arithmetic on the configuration, nothing else.

A 175B run on 128 GPUs is planned in milliseconds on a laptop: no Paddle, no device.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpt.config import (
    Config,
    DType,
    Recompute,
    accumulate_steps,
    global_batch_size,
    micro_batch_size,
    padded_vocab,
    world_size,
)

# Dense matmul peaks in FLOP/s, from the vendor's data sheets (no sparsity). A device that is not here gets no
# MFU rather than a wrong one.
PEAK_FLOPS = {
    ("V100", DType.fp16): 125e12,
    ("A100", DType.bf16): 312e12,
    ("A100", DType.fp16): 312e12,
    ("A800", DType.bf16): 312e12,
    ("A800", DType.fp16): 312e12,
    ("H100", DType.bf16): 989e12,
    ("H100", DType.fp16): 989e12,
    ("H800", DType.bf16): 989e12,
    ("H800", DType.fp16): 989e12,
}


def parameters(config: Config, *, padded: bool = True) -> int:
    """Number of parameters: (V + S) h + L (4 h^2 + 2 h f + 9 h + f) + 2 h, the head tied to the embedding.

    Args:
        config: h hidden, f ffn, L layers, S positions; V is the padded vocabulary.
        padded: False counts ``model.vocab`` rows only.
    """
    m = config.model
    vocab = padded_vocab(config) if padded else m.vocab
    block = 4 * m.hidden**2 + 2 * m.hidden * m.ffn + 9 * m.hidden + m.ffn
    return (vocab + m.positions) * m.hidden + m.layers * block + 2 * m.hidden


def flops_per_token(config: Config) -> float:
    """Matmul FLOPs of one training token, forward and backward: 6 N_matmul + 6 L h s.

    N_matmul are the weights that multiply (blocks and head). Attention is counted causally, half the square
    (as Megatron-LM does since 2025; PaLM appendix B counts the whole: 12 L h s). Recomputation is not counted.
    """
    m = config.model
    weights = m.layers * (4 * m.hidden**2 + 2 * m.hidden * m.ffn) + padded_vocab(config) * m.hidden
    return 6.0 * weights + 6.0 * m.layers * m.hidden * config.data.seq_len


def peak_flops(device_name: str, dtype: DType) -> float | None:
    """The device's matmul peak, or None where it is not known.

    Example:
        >>> peak_flops("Some CPU", DType.fp32) is None
        True
    """
    for (name, element), peak in PEAK_FLOPS.items():
        if name in device_name and element is dtype:
            return peak
    return None


def first_loss(config: Config) -> float:
    """Expected loss before training: ln V + init_std^2 h / 2.

    After the last LayerNorm a logit is a sum of h products of a unit-variance feature and an N(0, init_std^2)
    weight, so logits are N(0, init_std^2 h), and E ln sum exp of V such is ln V plus half their variance.
    """
    from math import log

    return log(config.model.vocab) + config.model.init_std**2 * config.model.hidden / 2


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank. ``activations`` is an estimate, the rest is exact."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


def memory(config: Config) -> Memory:
    """Bytes on the fullest rank: the first pipeline stage.

    State: 4 + 4 + 8 bytes per parameter in fp32 (weight, gradient, two moments), 2 + 2 + 12 below it (fp32
    master weight and moments); ZeRO divides optimizer (stage 1), gradients (2), weights (3) by the sharding
    degree; an offloaded optimizer's are in host memory. Activations: Korthikanti et al. 2022, table 2, scaled to
    the element size, with all in-flight micro batches of 1F1B (pp of them on the first stage).
    """
    m, p = config.model, config.parallel
    embedding = (padded_vocab(config) / p.mp_degree + m.positions) * m.hidden
    block = (4 * m.hidden**2 + 2 * m.hidden * m.ffn + 3 * m.hidden + m.ffn) / p.mp_degree + 6 * m.hidden
    here = embedding + m.layers / p.pp_degree * block
    size = 4 if config.precision.dtype is DType.fp32 else 2
    state = 0 if config.optimizer.offload else 8 if size == 4 else 12
    shard = [p.sharding_degree if p.sharding_stage >= stage else 1 for stage in (3, 2, 1)]
    return Memory(
        weights=round(here * size / shard[0]),
        gradients=round(here * size / shard[1]),
        optimizer=round(here * state / shard[2]),
        activations=_activations(config, size),
    )


def _activations(config: Config, size: int) -> int:
    """In units of s b h, a block keeps 34 half-precision and mask bytes plus 5 a s / h for the attention matrix."""
    m, p = config.model, config.parallel
    tokens = config.data.seq_len * micro_batch_size(config)
    scale = size / 2
    mp = p.mp_degree
    outside = 10 / mp if p.sequence_parallel else 10
    matrix = 5 * m.heads * config.data.seq_len / m.hidden / mp
    per_token = {
        Recompute.none: outside + 24 / mp + matrix,
        Recompute.core_attn: outside + 24 / mp,
        Recompute.full_attn: outside + 24 / mp - 8 / mp,
        Recompute.full: 2 / (mp if p.sequence_parallel else 1),
    }[m.recompute]
    in_flight = min(p.pp_degree, accumulate_steps(config))
    blocks = m.layers / p.pp_degree * in_flight * per_token * tokens * m.hidden * scale
    logits = (config.model.loss_chunk or tokens) * padded_vocab(config) / mp * 4 if p.pp_degree == 1 else 0
    return round(blocks + logits)


def pipeline_bubble(config: Config) -> float:
    """Share of a step that a stage waits: (p - 1) / (v m + p - 1) for p stages, m micro batches, v chunks."""
    p, v = config.parallel.pp_degree, config.parallel.virtual_pp_degree
    return (p - 1) / (v * accumulate_steps(config) + p - 1)


def summary(config: Config) -> list[tuple[str, str]]:
    """The plan as rows of (what, how much), for people."""
    tokens = global_batch_size(config) * config.data.seq_len
    steps = config.trainer.max_steps
    need = memory(config)
    rows = [
        ("parameters", f"{parameters(config):,}"),
        ("ranks", f"{world_size(config)}{_degrees(config)}"),
        (
            "batch",
            f"{global_batch_size(config):,} samples = {tokens:,} tokens a step, "
            f"{accumulate_steps(config)} micro batch(es) of {micro_batch_size(config)} per replica",
        ),
        ("horizon", f"{steps:,} steps = {steps * tokens:,} tokens"),
        (
            "compute",
            f"{flops_per_token(config) / 1e9:.3g} GFLOP a token, "
            f"{flops_per_token(config) * tokens * steps:.3g} FLOP in all",
        ),
        (
            "memory",
            f"{_gib(need.total)} on the fullest rank: weights {_gib(need.weights)}, gradients {_gib(need.gradients)}, "
            f"optimizer {_gib(need.optimizer)}, activations about {_gib(need.activations)} "
            f"(recompute {config.model.recompute.value})",
        ),
        ("first loss", f"about {first_loss(config):.2f}"),
    ]
    if config.parallel.pp_degree > 1:
        rows.append(("pipeline bubble", f"{pipeline_bubble(config):.1%} of a step"))
    return rows


def _degrees(config: Config) -> str:
    p = config.parallel
    degrees = {"dp": p.dp_degree, "sharding": p.sharding_degree, "mp": p.mp_degree, "pp": p.pp_degree}
    product = " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1)
    return f" = {product}" if product else ""


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"
