"""The rules of ``parallel.engine`` and ``parallel.static``; part of ``gpt.rules``."""

from __future__ import annotations

from collections.abc import Iterator

from gpt.config import Config, DType, EngineKind, Task, replicas, world_size


def engine_problems(config: Config) -> Iterator[str]:
    """What Paddle's semi-auto engine is not asked for."""
    parallel = config.parallel
    fleet = "use parallel.engine=fleet"
    if parallel.engine is EngineKind.fleet:
        if parallel.static:
            yield "parallel.static=true lowers what the semi-auto engine has placed: add parallel.engine=auto"
        return
    if config.task in (Task.evaluate, Task.generate, Task.serve, Task.export):
        return  # they read weights under Fleet, see gpt.trained
    if world_size(config) == 1:
        yield f"parallel.engine=auto places tensors on several ranks, and all degrees are 1: {fleet}"
    if parallel.virtual_pp_degree > 1:
        yield (
            f"parallel.engine=auto gives a rank one stage, and parallel.virtual_pp_degree="
            f"{parallel.virtual_pp_degree}: use parallel.virtual_pp_degree=1, or {fleet[4:]}"
        )
    if parallel.sequence_parallel:
        yield f"parallel.engine=auto does not go with parallel.sequence_parallel=true: {fleet}"
    if parallel.dp_degree > 1 and parallel.sharding_degree > 1:
        yield (
            f"parallel.engine=auto shares state out among all replicas, not among {parallel.sharding_degree} of "
            f"{replicas(config)}: use parallel.dp_degree=1 parallel.sharding_degree={replicas(config)}, or {fleet[4:]}"
        )
    if config.optimizer.offload:
        yield f"optimizer.offload=true does not go with parallel.engine=auto: {fleet}"
    if parallel.static:
        yield from _static(config)


def _static(config: Config) -> Iterator[str]:
    """What is not lowered."""
    parallel, dynamic = config.parallel, "use parallel.static=false"
    if parallel.pp_degree > 1:
        yield (
            f"parallel.static=true lowers a whole model, and with parallel.pp_degree={parallel.pp_degree} a rank has "
            f"one stage of it: {dynamic}"
        )
    if parallel.sharding_degree > 1 and parallel.sharding_stage > 1:
        yield f"parallel.static=true does not go with parallel.sharding_stage={parallel.sharding_stage}: use stage 1"
    if config.precision.dtype is not DType.fp32:
        yield f"parallel.static=true computes in float32, not in precision={config.precision.dtype.value}: {dynamic}"
    if parallel.mp_degree > 1 and config.model.attention_dropout > 0:
        yield (
            f"parallel.static=true draws the same masks on all {parallel.mp_degree} mp ranks, and "
            f"model.attention_dropout={config.model.attention_dropout}: {dynamic} or model.attention_dropout=0"
        )
