"""The rules of ``device`` and ``plan``; called by ``gpt.rules``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gpt.config import Config, Task, replicas, world_size
from gpt.config_plan import DeviceSpec
from gpt.plan.cost import missing
from gpt.plan.picture import SUFFIXES

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
    if path.suffix not in SUFFIXES:
        yield f"plan.picture={path}: must end in {' or '.join(SUFFIXES)}"
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
    return [*memory, *missing(config, config.plan.devices or world_size(config))]


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
