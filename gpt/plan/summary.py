"""The plan as a few rows of (what, how much): what every run says of itself."""

from __future__ import annotations

from gpt.config.derived import accumulate_steps, global_batch_size, micro_batch_size, world_size
from gpt.config.schema import Config
from gpt.plan.flops import first_loss, flops_per_token, parameters
from gpt.plan.memory import memory
from gpt.plan.step_time import cost, pipeline_bubble


def summary(config: Config) -> list[tuple[str, str]]:
    """Rows by name: parameters, ranks, batch, horizon, compute, memory, first loss, and what else can be said."""
    tokens = global_batch_size(config) * config.data.seq_len
    steps = config.trainer.max_steps
    need = memory(config)
    product = degrees(config)
    parts = {"weights": need.weights, "gradients": need.gradients, "optimizer": need.optimizer}
    parts |= {"activations": need.activations, "working": need.working}
    rows = [
        ("parameters", f"{parameters(config):,}"),
        ("ranks", f"{world_size(config)}" + (f" = {product}" if product else "")),
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
            f"{_size(need.total)} on the fullest rank: {', '.join(f'{k} {_size(v)}' for k, v in parts.items())}",
        ),
        ("first loss", f"about {first_loss(config):.2f}"),
    ]
    if config.parallel.pp_degree > 1:
        rows.append(("pipeline bubble", f"{pipeline_bubble(config):.1%} of a step"))
    if found := cost(config):
        lasts = f"{duration(found.seconds)} a step, {duration(steps * found.seconds)} in all"
        rows.append(("time", f"about {lasts}, on {config.device.name}"))
    return rows


def degrees(config: Config) -> str:
    """Their product; '' for one rank."""
    p = config.parallel
    factors = {"dp": p.dp_degree, "sharding": p.sharding_degree, "mp": p.mp_degree, "pp": p.pp_degree}
    return " x ".join(f"{name} {degree}" for name, degree in factors.items() if degree > 1)


def layout(config: Config) -> str:
    """Everything of ``parallel`` in a few letters: 'dp2 mp8+sp pp16/v3', 'sharding16/2'; 'single' for one rank."""
    p = config.parallel
    parts = [f"dp{p.dp_degree}"] if p.dp_degree > 1 else []
    parts += [f"sharding{p.sharding_degree}/{p.sharding_stage}"] if p.sharding_degree > 1 else []
    parts += [f"mp{p.mp_degree}" + "+sp" * p.sequence_parallel] if p.mp_degree > 1 else []
    virtual = f"/v{p.virtual_pp_degree}" if p.virtual_pp_degree > 1 else ""
    parts += [f"pp{p.pp_degree}{virtual}"] if p.pp_degree > 1 else []
    return " ".join(parts) or "single"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them.

    Example:
        >>> duration(0.25), duration(90000)
        ('250 ms', '25 hours')
    """
    for limit, unit, size in ((1, "ms", 1e-3), (600, "s", 1), (6000, "minutes", 60), (172800, "hours", 3600)):
        if seconds < limit:
            return f"{seconds / size:,.3g} {unit}"
    return f"{seconds / 86400:,.3g} days" if seconds < 8.64e7 else f"{seconds / 86400:,.0f} days"


def _size(count: int) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**28 else f"{count / 2**20:.3g} MiB"
