"""``parallel=auto``: degrees for the devices at hand, chosen before the rules look and before the run has its name.

What has no value in a composed ``parallel`` is chosen by ``gpt.plan.explain``; a function of the configuration, the
command's overrides and this machine, so that the same command finds its run again.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from gpt.config import derived
from gpt.config.cluster import ClusterKind, Device
from gpt.config.derived import accumulate_steps, global_batch_size, micro_batch_size, needs_checkpoint
from gpt.config.rules import check
from gpt.config.schema import Config, Parallel, Task, degrees_name
from gpt.config.task_schemas import DeviceSpec
from gpt.plan import devices, explain, report, search
from gpt.plan.explain import AutoParallelResult
from gpt.plan.search import LayoutConstraints
from gpt.plan.summary import layout
from gpt.utils import launch_env, machine
from gpt.utils.console import Console
from gpt.utils.errors import UserError
from gpt.utils.files import conf_dir

KEYS = tuple(f.name for f in dataclasses.fields(Parallel) if f.name in vars(search.FREE))
ONE = {"sequence_parallel": False}  # and 1 for all others
FREE = ("trainer.micro_batch_size", "model.recompute", "model.no_recompute_layers")  # unless the user gives them
EXPERIMENTS = ("experiment", "debug", "local")  # groups whose files are what a user gives


StoredConfig = Callable[[Config], Config | None]


@dataclass(frozen=True)
class DevicePool:
    """The devices: how many (``exact``: no fewer will do), what they are in words and in figures."""

    count: int
    exact: bool
    where: str
    device: DeviceSpec


def auto_keys(composed: DictConfig) -> list[str]:
    """Keys of ``parallel`` that have no value."""
    parallel = composed.get("parallel")
    return [key for key in KEYS if OmegaConf.is_missing(parallel, key)] if parallel is not None else []


def resolve_auto(
    composed: DictConfig, choices: dict[str, Any], overrides: Sequence[str], config_of: StoredConfig
) -> tuple[DictConfig, list[str], AutoParallelResult | None]:
    """Choose degrees for a composed configuration that has none.

    Args:
        composed: without its ``hydra`` node; it stays as it is.
        choices: the option chosen for each config group.
        overrides: of the command: what they name is kept.
        config_of: returns what ``checkpoint=`` was trained with; None if that cannot be read.

    Returns:
        The configuration, the problems that kept degrees from being chosen, and the choice if there was one to make.
    """
    free = auto_keys(composed)
    if not free:
        return composed, [], None
    alone, problems = _without_layout(composed, free, choices, config_of)
    if alone is None or problems:
        return composed, problems, None
    given = _given(alone, composed, free, _named(choices, overrides))
    try:
        pool = _ground(alone)
        choice = _choose(alone, pool, given)
    except UserError as error:
        return composed, error.problems, None
    result, changed = _with(composed, choice.taken, free, given)
    if alone.task is Task.plan and alone.device.name is None:  # what was chosen for it is also planned for it
        result.device = OmegaConf.structured(pool.device)
    return result, [], replace(choice, changed=changed)


def for_task(whole: DictConfig, composed: DictConfig) -> DictConfig:
    """What was chosen, as far as a task can use it: a server is one replica, an export one rank."""
    task = str(getattr(whole.get("task"), "value", whole.get("task")))
    dropped = {"serve": ("dp_degree", "sharding_degree", "sharding_stage"), "export": KEYS}.get(task, ())
    if free := [key for key in dropped if key in auto_keys(composed)]:
        whole = copy.deepcopy(whole)
        for key in free:
            whole.parallel[key] = ONE.get(key, 1)
    return whole


def name(parallel: dict[str, Any], preset: str) -> str:
    """The preset's part of a run's name: of degrees that were chosen, the preset that has them, else what they are."""
    if preset != "auto":
        return preset
    degrees = Parallel(**parallel)
    return _preset(degrees) or degrees_name(degrees)


def show(choice: AutoParallelResult | None, config: Config, console: Console) -> None:
    """Print the best layouts, why, and what was taken for ``config``; nothing if there was no choice."""
    if choice is None:
        return
    title = f"parallel=auto: {choice.number:,} layouts of {choice.where} fit"
    console.columns(title, *report.choice_columns(choice))
    rows = [(str(number), why) for number, why in enumerate(explain.reasons(choice), 1)]
    rows += [("assumed", "; ".join(choice.assumed) + ": times only compare")] if choice.assumed else []
    command = " ".join(equivalent_overrides(choice, config.parallel))
    console.table("why", [*rows, ("taken", f"{layout(choice.taken)}: {command}")])


def equivalent_overrides(choice: AutoParallelResult, degrees: Parallel) -> list[str]:
    """Return what to type for the same run without ``parallel=auto``."""
    preset = _preset(degrees)
    keys = [] if preset else search.degree_keys(degrees)
    return [f"parallel={preset or 'single'}", *keys, *(f"{key}={value}" for key, value in choice.changed.items())]


def _without_layout(
    composed: DictConfig, free: list[str], choices: dict[str, Any], config_of: StoredConfig
) -> tuple[Config | None, list[str]]:
    """The job without a layout, and what is wrong with it whatever its layout."""
    plain = OmegaConf.create(OmegaConf.to_container(composed, resolve=False, enum_to_str=True))
    assert isinstance(plain, DictConfig)
    given = {key: plain.parallel[key] for key in KEYS if key in plain.parallel and key not in free}
    for key in KEYS:
        plain.parallel[key] = ONE.get(key, 1)
    plan, micro = plain.get("plan"), None
    if plan and isinstance(plan.devices, int) and plan.devices >= 1:
        plan.devices = None
    if plain.get("trainer"):
        micro, plain.trainer.micro_batch_size = plain.trainer.micro_batch_size, None
    config, problems = check(plain, choices)
    problems += [
        f"parallel.{key}={value}: must be at least 1" for key, value in given.items() if value < 1 and key not in ONE
    ]
    if config is None or problems:
        return None, problems
    config = derived.replace_in(config, {"trainer.micro_batch_size": micro, "plan.devices": composed.plan.devices})
    if config.checkpoint and needs_checkpoint(config.task) and (stored := config_of(config)):
        kept = ("task", "plan", "device", "cluster", "parallel")
        return replace(stored, **{key: getattr(config, key) for key in kept}), []
    return config, []


def _named(choices: dict[str, Any], overrides: Sequence[str]) -> set[str]:
    """Keys that the user gave: on the command line, in an experiment."""
    found = {override.lstrip("+").partition("=")[0] for override in overrides}
    for group in EXPERIMENTS:
        path = Path(conf_dir(), group, f"{choices.get(group)}.yaml")
        loaded = OmegaConf.load(path) if path.is_file() else OmegaConf.create()
        found |= {key for key in FREE if OmegaConf.select(loaded, key, default=None) is not None}
    return found


def _given(alone: Config, composed: DictConfig, free: list[str], named: set[str]) -> LayoutConstraints:
    kept = {key: composed.parallel[key] for key in KEYS if key not in free}
    if "trainer.micro_batch_size" in named and alone.trainer.micro_batch_size:
        kept["micro_batch_size"] = alone.trainer.micro_batch_size
    if "model.recompute" in named or "model.no_recompute_layers" in named:
        kept["recompute"] = alone.model.recompute
    return LayoutConstraints(**kept)


def _choose(alone: Config, pool: DevicePool, given: LayoutConstraints) -> AutoParallelResult:
    """Choose for the training, whatever the task: a task on a trained run must find it.

    Raises:
        UserError: no layout fits.
    """
    job = replace(alone, task=Task.pretrain, device=pool.device, plan=replace(alone.plan, devices=None))
    count = pool.count
    if not pool.exact:  # of cores that do not divide the batch the most that do
        layouts = (n for n in range(count, 0, -1) if explain.legal(_batch_for(job, n, given), n, given))
        count = next(layouts, count)
    where = pool.where if count == pool.count else f"{count} of {pool.where}"
    return explain.choose(_batch_for(job, count, given), count, where, given)


def _batch_for(config: Config, count: int, given: LayoutConstraints) -> Config:
    """With a global batch: where none is given what data parallel alone would have, a micro batch per replica."""
    replicas = max(1, count // ((given.mp_degree or 1) * (given.pp_degree or 1)))
    batch = config.trainer.global_batch_size or (config.trainer.micro_batch_size or 1) * replicas
    return replace(config, trainer=replace(config.trainer, global_batch_size=batch))


def _with(
    composed: DictConfig, taken: Config, free: list[str], given: LayoutConstraints
) -> tuple[DictConfig, dict[str, Any]]:
    """The composed configuration with what was chosen, and what else than degrees had to be set for that.

    A value that already means the same stays, so that the run is that of the preset with these degrees.
    """
    result = copy.deepcopy(composed)
    changed: dict[str, Any] = {}
    with open_dict(result):
        for key in free:
            result.parallel[key] = getattr(taken.parallel, key)
        if needs_checkpoint(taken.task) and composed.get("checkpoint"):
            return result, {}  # the rest is the checkpoint's
        now = replace(taken, trainer=replace(taken.trainer, micro_batch_size=composed.trainer.micro_batch_size,
                                             global_batch_size=composed.trainer.global_batch_size))  # fmt: skip
        if given.micro_batch_size is None and micro_batch_size(now) != micro_batch_size(taken):
            changed["trainer.micro_batch_size"] = taken.trainer.micro_batch_size
            now = derived.replace_in(now, {"trainer.micro_batch_size": taken.trainer.micro_batch_size})
        if global_batch_size(now) != global_batch_size(taken) or accumulate_steps(now) != accumulate_steps(taken):
            changed["trainer.global_batch_size"] = global_batch_size(taken)
        if composed.model.recompute is not taken.model.recompute:
            changed["model.recompute"] = taken.model.recompute.value
        if list(composed.model.no_recompute_layers) != taken.model.no_recompute_layers:
            changed["model.no_recompute_layers"] = taken.model.no_recompute_layers
        for key, value in changed.items():
            OmegaConf.update(result, key, value)
    return result, changed


def _preset(degrees: Parallel) -> str | None:
    """The option of ``parallel`` that has just these degrees."""
    for path in sorted(Path(conf_dir(), "parallel").glob("*.yaml")):
        loaded = OmegaConf.merge(derived.schema(Parallel), OmegaConf.load(path))
        if not OmegaConf.missing_keys(loaded) and degrees == OmegaConf.to_object(loaded):
            return path.stem
    return None


def _ground(config: Config) -> DevicePool:
    """The devices that a job may use.

    Raises:
        UserError: the memory of this host's GPU is not known.
    """
    role, gpu = launch_env.detect(os.environ), derived.resolve_device(config) is Device.gpu
    device = _device(config, gpu=gpu)
    here = machine.gpus() if gpu else machine.cores()
    kind = device.name or "GPU" if gpu or config.device.name not in (None, "cpu") else "core"

    def of(count: int) -> str:
        return f"{count:,} {kind}" + "s" * (count > 1) if kind == "core" else f"{count:,} x {kind}"

    asked = config.plan.devices
    if asked is not None:
        return DevicePool(asked, True, of(asked), device)
    if (each := config.cluster.per_node) and config.cluster.kind is not ClusterKind.local:
        return DevicePool(each, False, f"{of(each)} (a node of the cluster; plan.devices=N says otherwise)", device)
    if role.starter:
        count = role.world * (here if role.spread and gpu else 1)
        return DevicePool(count, True, f"{of(count)}, as {role.starter} started", device)
    if config.task is Task.plan and not gpu and config.device.name not in (None, "cpu"):
        return DevicePool(
            device.per_node, False, f"{of(device.per_node)} (a node; plan.devices=N says otherwise)", device
        )
    return DevicePool(here, False, f"{of(here)} of this host", device)


def _device(config: Config, *, gpu: bool) -> DeviceSpec:
    """What is known of one device: ``device=``, else what this host's is called, or what was measured of it."""
    if config.device.name:
        found = config.device
    elif gpu:
        found = devices.called(machine.gpu_name()) or config.device
    else:
        found = devices.this_host()
    stated = {key: getattr(config.device, key) for key in ("memory_gib", "bandwidth_gb_s", "intra_node_gb_s")}
    found = replace(found, **{key: value for key, value in stated.items() if value is not None})
    if found.memory_gib is None and found.name == "cpu":
        found = replace(found, memory_gib=machine.memory_gib())
    if found.memory_gib is None:
        called = machine.gpu_name() or "this device"
        raise UserError.of(
            [f"parallel=auto: how much memory {called} has is not known: device=... or device.memory_gib=... says it"]
        )
    return found
