"""The plan as rows of (what, how much), for people."""

from __future__ import annotations

from gpt.config import Config, accumulate_steps, global_batch_size, micro_batch_size, world_size
from gpt.plan.cost import pipeline_bubble
from gpt.plan.counts import first_loss, flops_per_token, parameters
from gpt.plan.footprint import memory


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
