"""The rules between fields. Every problem of a command is found at once and says its remedy.

Pure: no Hydra, no Paddle, no file is opened. What depends on this machine is in ``launchers.checks``,
what depends on data files in ``gpt.data``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gpt.config import derived
from gpt.config.cluster_rules import cluster_problems
from gpt.config.derived import global_batch_size, micro_batch_size, peak, replicas, world_size
from gpt.config.optimizers import OPTIMIZERS
from gpt.config.sampling import Sampling
from gpt.config.schema import TASK_SECTIONS, Config, DataKind, DType, EngineKind, Ranks, Recompute, Task
from gpt.config.task_schemas import BYTE_ALPHABET, DeviceSpec, Section


def check(composed: DictConfig, choices: dict[str, Any]) -> tuple[Config | None, list[str]]:
    """Check a composed configuration against the schema and the rules.

    Args:
        composed: what Hydra composed, without its ``hydra`` node; interpolations may be unresolved.
        choices: the option chosen for each config group (``hydra.runtime.choices``).

    Returns:
        The typed configuration (None if it cannot be typed) and all problems found.
    """
    problems = group_problems(choices)
    missing = sorted(OmegaConf.missing_keys(composed))
    problems += [f"{key} has no value: give one with {key}=..." for key in missing]
    plain = OmegaConf.to_container(composed, resolve=not missing, enum_to_str=True)
    assert isinstance(plain, dict)
    strays = unknown_keys(plain)
    problems += strays
    if missing or any(choices.get(group) is None for group in _required_groups()):
        return None, problems
    config = derived.typed(plain) if strays else _as_composed(composed) or derived.typed(plain)
    return config, problems + rule_problems(config)


def _as_composed(composed: DictConfig) -> Config | None:
    """The configuration as it was composed from the schema, which has checked its types; None if a part was not."""
    hints = typing.get_type_hints(Config)
    parts = {key: kind for key, kind in hints.items() if dataclasses.is_dataclass(kind)}
    found = OmegaConf.to_object(composed)
    if isinstance(found, Config):
        return found
    assert isinstance(found, dict)
    if set(found) != set(hints) or any(type(found[key]) is not kind for key, kind in parts.items()):
        return None
    values = OmegaConf.merge(_root_values(), {key: value for key, value in found.items() if key not in parts})
    return Config(**vars(OmegaConf.to_object(values)), **{key: found[key] for key in parts})


@functools.cache
def _root_values() -> DictConfig:
    """Schema of what is not in a section: a copy of the root has lost the types of these."""
    hints = typing.get_type_hints(Config)
    fields = [(f.name, hints[f.name], dataclasses.field(default=f.default)) for f in dataclasses.fields(Config)]
    made = dataclasses.make_dataclass("Root", [each for each in fields if not dataclasses.is_dataclass(each[1])])
    structured = OmegaConf.structured(made)
    assert isinstance(structured, DictConfig)
    return structured


def known_keys(of: type = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys of the schema, sections included."""
    hints = typing.get_type_hints(of)
    for field in dataclasses.fields(of):
        yield prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from known_keys(hints[field.name], f"{prefix}{field.name}.")


def suggest(key: str, among: list[str]) -> str:
    """' (did you mean X?)', or nothing if nothing is near.

    Example:
        >>> suggest("trainer.max_step", ["trainer.max_steps", "seed"])
        ' (did you mean trainer.max_steps?)'
    """
    near = difflib.get_close_matches(key, among, n=1, cutoff=0.6)
    if not near:
        leaf = key.rsplit(".", 1)[-1]
        near = [k for k in among if k.rsplit(".", 1)[-1] == leaf][:1]
    return f" (did you mean {near[0]}?)" if near else ""


def unknown_keys(plain: dict[Any, Any]) -> list[str]:
    """Find what '+key=value' smuggled in; the strays are removed from ``plain``."""
    known = _all_keys()
    problems: list[str] = []

    def walk(node: dict[Any, Any], prefix: str) -> None:
        for key in list(node):
            name = f"{prefix}{key}"
            if name not in known:
                problems.append(f"unknown key {name}{suggest(name, known)}")
                del node[key]
            elif isinstance(node[key], dict):
                walk(node[key], f"{name}.")

    walk(plain, "")
    return problems


@functools.cache
def _all_keys() -> list[str]:
    return list(known_keys())


@functools.cache
def _required_groups() -> list[str]:
    """Return the config groups that need an option: sections of tasks and grids are no groups."""
    sections = [key for key, kind in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(kind)]
    return ["task", *(name for name in sections if name not in (*TASK_SECTIONS, "grid", "optuna"))]


def group_problems(choices: dict[str, Any]) -> list[str]:
    """A group that '~group' removed, or for which a list was given."""
    removed = [group for group in _required_groups() if choices.get(group) is None]
    return [f"no option of the group {group} is chosen: choose one with {group}=..." for group in removed]


def rule_problems(config: Config) -> list[str]:
    """All violations of rules between fields, each a sentence with the numbers and the remedy."""
    return [
        *_ranges(config),
        *_model(config),
        *_parallel(config),
        *engine_problems(config),
        *_batch(config),
        *_data(config),
        *plan_problems(config),
        *cluster_problems(config),
        *_task(config),
    ]


def _ranges(config: Config) -> Iterator[str]:
    """Single values out of their range."""
    at_least = {
        "model.vocab": 2, "model.hidden": 1, "model.layers": 1, "model.heads": 1, "model.ffn": 1,
        "model.positions": 1, "model.loss_chunk": 0,
        "parallel.dp_degree": 1, "parallel.sharding_degree": 1, "parallel.mp_degree": 1,
        "parallel.pp_degree": 1, "parallel.virtual_pp_degree": 1,
        "data.seq_len": 1, "optimizer.weight_decay": 0, "optimizer.clip_norm": 0,
        "schedule.warmup_steps": 0, "schedule.decay_steps": 1, "schedule.min_lr": 0,
        "trainer.max_steps": 1, "trainer.micro_batch_size": 1, "trainer.global_batch_size": 1,
        "trainer.save_every": 0, "trainer.eval_every": 0, "trainer.eval_batches": 1,
        "trainer.keep_checkpoints": 1, "trainer.log_every": 1,
        "evaluate.stride": 1, "evaluate.batch_size": 1, "evaluate.max_samples": 1,
        "generate.batch_size": 1, "cluster.threads": 1, "cluster.hang_seconds": 0, "seed": 0,
        "serve.port": 0, "serve.queue": 1, "serve.max_body": 1, "serve.max_texts": 1, "serve.max_tokens": 1,
        "prepare.min_length": 1, "prepare.limit": 1, "prepare.workers": 1,
    }  # fmt: skip
    for key, low in at_least.items():
        value = _get(config, key)
        if value is not None and not value >= low:
            yield f"{key}={value}: must be at least {low}"
    for key in ("model.dropout", "model.attention_dropout"):
        if not 0 <= _get(config, key) < 1:
            yield f"{key}={_get(config, key)}: a probability from 0 up to but not including 1"
    for key in ("model.init_std", "model.layer_norm_eps", "optimizer.lr", "optimizer.eps"):
        if not 0 < _get(config, key) < float("inf"):
            yield f"{key}={_get(config, key)}: must be more than 0"
    yield from Sampling.of(config.generate, config.seed).problems()
    if not config.generate.prompt:
        yield "generate.prompt is empty: there must be something to continue"
    yield from _optimizer(config)
    if config.schedule.min_lr > config.optimizer.lr:
        yield f"schedule.min_lr={config.schedule.min_lr} is above optimizer.lr={config.optimizer.lr}"
    if config.schedule.warmup_steps > config.schedule.decay_steps and config.schedule.name.value == "cosine":
        yield (
            f"schedule.warmup_steps={config.schedule.warmup_steps} is more than "
            f"schedule.decay_steps={config.schedule.decay_steps}"
        )


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _optimizer(config: Config) -> Iterator[str]:
    if config.optimizer.name not in OPTIMIZERS:
        yield f"optimizer.name={config.optimizer.name}: no such optimizer; there are {', '.join(OPTIMIZERS)}"
    elif config.parallel.engine is EngineKind.auto and not OPTIMIZERS[config.optimizer.name].semi_auto:
        tried = ", ".join(name for name, spec in OPTIMIZERS.items() if spec.semi_auto)
        yield f"optimizer.name={config.optimizer.name} was not tried with parallel.engine=auto: use {tried}, or fleet"
    if not 0 <= config.optimizer.momentum < 1:
        yield f"optimizer.momentum={config.optimizer.momentum}: from 0 up to but not including 1"
    betas = config.optimizer.betas
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        yield f"optimizer.betas={betas}: two numbers from 0 up to but not including 1"


def _model(config: Config) -> Iterator[str]:
    model = config.model
    if model.heads >= 1 and model.hidden >= 1 and model.hidden % model.heads:
        yield (
            f"model.hidden={model.hidden} is not divisible by model.heads={model.heads}: "
            f"try model.heads={_nearest_divisor(model.hidden, model.heads)}"
        )
    stray = [i for i in model.no_recompute_layers if not 0 <= i < model.layers]
    if stray:
        yield f"model.no_recompute_layers={stray}: layers are numbered 0 to {model.layers - 1}"
    if model.no_recompute_layers and model.recompute is Recompute.none:
        yield "model.no_recompute_layers says which layers are exempt, but model.recompute=none"
    if config.data.seq_len > model.positions:
        yield (
            f"data.seq_len={config.data.seq_len} is longer than model.positions={model.positions}: "
            f"set data.seq_len={model.positions} or raise model.positions"
        )


def _parallel(config: Config) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    mp, pp, vpp = parallel.mp_degree, parallel.pp_degree, parallel.virtual_pp_degree
    if min(mp, pp, vpp, parallel.sharding_degree, parallel.dp_degree) < 1:
        return  # said by _ranges
    for name in ("heads", "ffn"):
        if getattr(model, name) % mp:
            yield f"model.{name}={getattr(model, name)} is not divisible by parallel.mp_degree={mp}"
    if model.layers % (pp * vpp):
        yield (
            f"model.layers={model.layers} is not divisible by parallel.pp_degree x "
            f"parallel.virtual_pp_degree = {pp} x {vpp} = {pp * vpp}"
        )
    if vpp > 1 and pp <= 2:
        yield f"parallel.virtual_pp_degree={vpp} needs parallel.pp_degree of at least 3, not {pp}"
    if parallel.sequence_parallel and mp == 1:
        yield "parallel.sequence_parallel=true needs parallel.mp_degree of at least 2"
    if parallel.sequence_parallel and config.data.seq_len % mp:
        yield (f"parallel.sequence_parallel: data.seq_len={config.data.seq_len} is not divisible by mp_degree={mp}")
    if parallel.sharding_stage not in (1, 2, 3):
        yield f"parallel.sharding_stage={parallel.sharding_stage}: 1, 2 or 3"
    elif parallel.sharding_stage > 1 and pp > 1:
        yield (
            f"parallel.sharding_stage={parallel.sharding_stage} does not go with parallel.pp_degree={pp}, "
            "whose schedule adds up the tied table's gradients itself: use parallel.sharding_stage=1"
        )


def _batch(config: Config) -> Iterator[str]:
    trainer, parallel = config.trainer, config.parallel
    if min(replicas(config), parallel.pp_degree, trainer.micro_batch_size or 1) < 1:
        return  # said by _ranges
    unit = micro_batch_size(config) * replicas(config)
    total = global_batch_size(config)
    if total % unit:
        below, above = total // unit * unit, -(-total // unit) * unit
        yield (
            f"trainer.global_batch_size={total} is not divisible by trainer.micro_batch_size x replicas = "
            f"{micro_batch_size(config)} x {replicas(config)} = {unit}: "
            f"try {' or '.join(str(n) for n in (below, above) if n)}"
        )
    elif parallel.virtual_pp_degree > 1 and (total // unit) % parallel.pp_degree:
        yield (
            f"virtual pipeline: {total // unit} accumulate steps are not divisible by "
            f"parallel.pp_degree={parallel.pp_degree}"
        )


def _data(config: Config) -> Iterator[str]:
    data = config.data
    if len(data.split) != 3 or min(data.split, default=0) < 0 or not data.split[0] > 0:
        yield f"data.split={data.split}: three shares (train, validation, test), none negative, train above 0"
    if data.kind in (DataKind.stdlib, DataKind.text) and not BYTE_ALPHABET < data.vocab <= config.model.vocab:
        yield (
            f"data.vocab={data.vocab}: a byte-level BPE needs at least {BYTE_ALPHABET + 1} tokens "
            f"and at most model.vocab={config.model.vocab}"
        )
    if data.kind is DataKind.blend and not data.blend:
        yield "data.blend is empty: 'data.blend=[{path: a, weight: 0.7}, {path: b, weight: 0.3}]'"
    for part in data.blend:
        if not 0 < part.weight < float("inf"):
            yield f"data.blend: {part.path} has weight {part.weight}, which must be more than 0"
    if data.eot_id is not None and not 0 <= data.eot_id < config.model.vocab:
        yield f"data.eot_id={data.eot_id} is outside the vocabulary of model.vocab={config.model.vocab} tokens"


def _task(config: Config) -> Iterator[str]:
    """Problems of the command's own task."""
    parallel, ranks = config.parallel, config.task.facts.ranks
    if ranks is Ranks.one and world_size(config) > 1:
        yield f"task={config.task.value} is done by one rank, not {world_size(config)}: leave out parallel=..."
    if ranks is Ranks.one_replica and replicas(config) > 1:
        yield (
            f"task={config.task.value}: parallel.dp_degree={parallel.dp_degree} and parallel.sharding_degree="
            f"{parallel.sharding_degree} would make {replicas(config)} copies of the model that answer the same "
            "request: start as many servers with other ports behind a balancer; mp and pp degrees share one model out"
        )
    if isinstance(section := getattr(config, config.task.name, None), Section):
        yield from section.problems()


def _nearest_divisor(of: int, near: int) -> int:
    """Return the divisor of ``of`` nearest to ``near``; pairs of divisors are found up to the square root."""
    small = [d for d in range(1, math.isqrt(min(of, 10**12)) + 1) if of % d == 0]
    return min((*small, *(of // d for d in small)), key=lambda d: (abs(d - near), d))


# The rules of ``parallel.engine`` and ``parallel.static``; part of ``gpt.config.rules``.


def engine_problems(config: Config) -> Iterator[str]:
    """What Paddle's semi-auto engine is not asked for."""
    parallel = config.parallel
    fleet = "use parallel.engine=fleet"
    if parallel.engine is EngineKind.fleet:
        if parallel.static:
            yield "parallel.static=true lowers what the semi-auto engine has placed: add parallel.engine=auto"
        return
    if config.task.facts.needs_checkpoint:
        return  # such tasks read weights under Fleet, see gpt.runs.source
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


# The rules of ``device`` and ``plan``; called by ``gpt.config.rules``.

POSITIVE = ("memory_gib", "bandwidth_gb_s", "intra_node_gb_s", "inter_node_gb_s", "watts", "per_node")


def plan_problems(config: Config) -> Iterator[str]:
    """What is wrong with the device, and with what is asked of a plan."""
    yield from _device(config.device)
    plan = config.plan
    for key in ("token_budget", "devices", "top"):
        value = getattr(plan, key)
        if value is not None and value < 1:
            yield f"plan.{key}={value}: must be at least 1"
    if not 0 <= plan.reserve_gib < float("inf"):
        yield f"plan.reserve_gib={plan.reserve_gib}: must be at least 0"
    if config.task is not Task.plan:
        return
    memory = config.device.memory_gib
    if memory is not None and memory <= plan.reserve_gib:
        yield f"plan.reserve_gib={plan.reserve_gib:g} leaves nothing of device.memory_gib={memory:g}"
    if plan.devices not in (None, world_size(config)) and not plan.search:
        yield (
            f"plan.devices={plan.devices} is how many devices a search may use: add plan.search=true, or parallel=auto "
            f"(the layout at hand has {world_size(config)} ranks)"
        )
    if plan.require_fit and memory is None:
        yield "plan.require_fit=true needs device.memory_gib: choose a device with device=..."
    if plan.picture is not None:
        yield from _picture(config, Path(plan.picture))
    if plan.search and (lacking := _lacking(config)):
        yield _silent(config, "plan.search=true", "ranks by time", lacking)


def _picture(config: Config, path: Path) -> Iterator[str]:
    if path.suffix not in PICTURE_SUFFIXES:
        yield f"plan.picture={path}: must end in {' or '.join(PICTURE_SUFFIXES)}"
    if not path.parent.is_dir():
        yield f"plan.picture={path}: there is no folder {path.parent}"
    if config.plan.search:
        yield f"plan.picture={path} is of the layout at hand: leave plan.search=true away, then draw the one you choose"
    elif lacking := [key for key in _lacking(config) if key != "device.memory_gib"]:
        yield _silent(config, f"plan.picture={path}", "shows seconds", lacking)


def _silent(config: Config, asked: str, what: str, lacking: list[str]) -> str:
    if config.device.name == "cpu":
        return f"{asked} on device=cpu needs this host measured: python scripts/calibrate.py, and precision=fp32"
    return (
        f"{asked} {what}, for which {config.device.name or 'device=auto'} does not state {', '.join(lacking)}: "
        "choose with device=..., or another precision=..."
    )


def _lacking(config: Config) -> list[str]:
    if min(replicas(config), world_size(config), config.device.per_node) < 1:
        return []  # said elsewhere
    memory = [] if config.device.memory_gib else ["device.memory_gib"]
    return [*memory, *missing_device_keys(config, config.plan.devices or world_size(config))]


def _device(device: DeviceSpec) -> Iterator[str]:
    peaks = {f"peak_tflops.{key}": getattr(device.peak_tflops, key) for key in ("fp32", "bf16", "fp16")}
    for key, value in {**{key: getattr(device, key) for key in POSITIVE}, **peaks}.items():
        if value is not None and not 0 < value < float("inf"):
            yield f"device.{key}={value}: must be more than 0 (null: not known)"
    for key in ("efficiency", "bandwidth_share"):
        if not 0 < getattr(device, key) <= 1:
            yield f"device.{key}={getattr(device, key)}: a share of what is stated, from more than 0 up to 1"
    if device.price_per_hour is not None and not 0 <= device.price_per_hour < float("inf"):
        yield f"device.price_per_hour={device.price_per_hour}: must be at least 0"


def missing_device_keys(config: Config, devices: int | None = None) -> list[str]:
    """Keys of the device without which no time can be said of so many, or of the layout at hand."""
    device, ranks = config.device, devices or world_size(config)
    needed = {
        f"device.peak_tflops.{config.precision.dtype.value}": peak(device, config.precision.dtype),
        "device.bandwidth_gb_s": device.bandwidth_gb_s,
        "device.intra_node_gb_s": device.intra_node_gb_s or min(ranks, device.per_node) == 1,
        "device.inter_node_gb_s": device.inter_node_gb_s or ranks <= device.per_node,
        "the speed of its host, where the optimizer is": not config.optimizer.offload,
    }
    return [key for key, value in needed.items() if not value]


PICTURE_SUFFIXES = (".svg", ".png")
