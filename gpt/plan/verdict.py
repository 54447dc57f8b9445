"""Whether a job fits its devices, by how much, what bounds it, and what else would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gpt.config import Config, global_batch_size, world_size
from gpt.plan import devices
from gpt.plan.cost import Cost, cost
from gpt.plan.footprint import Memory, memory, stages
from gpt.plan.search import GIB, Candidate, candidates, fits, limit

NEAREST = 3  # layouts to name


@dataclass(frozen=True)
class Verdict:
    """``fits`` is None where the device's memory is not stated. ``lines`` are for people, the first says it."""

    fits: bool | None
    lines: list[str]


def judge(config: Config) -> Verdict:
    """What is to be said of a job."""
    needs = stages(config)
    stage, need = max(enumerate(needs), key=lambda pair: pair[1].total)
    where = f" on stage {stage}" if config.parallel.pp_degree > 1 else ""
    largest = f"the most of it {_largest(need)}"
    room = limit(config)
    if room is None:
        lines = [f"{gib(need.total)}{where}, {largest}", *_holders(config)]
        return Verdict(None, lines)
    device, spare = devices.of_rank(config), room - need.total
    kept = config.plan.reserve_gib / (world_size(config) if device.shared else 1)
    have = f"{gib(room)} of {device.name or 'the device'} ({device.memory_gib:.4g} less {kept:.3g} kept)"
    if spare >= 0:
        lines = [f"fits: {gib(need.total)}{where} within the {have}; {gib(spare)} to spare; {largest}"]
        time = cost(config)
        return Verdict(True, [*lines, *([f"the time is bound by: {bound(time)} of a step"] if time else [])])
    head = f"does not fit: {gib(need.total)}{where} is {gib(-spare)} more than the {have}; {largest}"
    near = [" ".join(keys) for keys in nearest(config)]
    remedy = [f"would fit: {keys}" for keys in near] or list(_elsewhere(config))
    return Verdict(False, [head, *remedy])


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / GIB:.1f} GiB"


def _largest(need: Memory) -> str:
    parts = {
        "weights": need.weights,
        "gradients": need.gradients,
        "optimizer state": need.optimizer,
        "activations": need.activations,
        "working memory": need.working,
    }
    name = max(parts, key=lambda part: parts[part])
    return f"{name}, {gib(parts[name])}"


def bound(time: Cost) -> str:
    """What takes most of a step."""
    parts = {"compute": time.compute, "exchanges": time.exposed, "waiting": time.bubble}
    name = max(parts, key=lambda part: parts[part])
    return f"{name} {parts[name] / time.seconds:.0%}"


def _holders(config: Config) -> list[str]:
    """Which known devices would hold it."""
    holds: dict[bool, list[str]] = {True: [], False: []}
    for name, spec in devices.table().items():
        there = replace(config, device=spec)
        room = limit(there)
        if room is not None:
            holds[max(need.total for need in stages(there)) <= room].append(name)
    fits = ", ".join(holds[True]) or "none of the known devices"
    return [f"fits {fits}" + (f"; not {', '.join(holds[False])}" if holds[True] and holds[False] else "")]


def nearest(config: Config) -> list[list[str]]:
    """Up to ``NEAREST`` sets of keys that make the job fit on as many devices: the fewest changes, then the fastest."""
    found = candidates(config, world_size(config))
    order = sorted(found, key=lambda one: (len(changes(config, one)), one.seconds, one.bytes))
    return [changes(config, candidate) for candidate in order[:NEAREST]]


def _elsewhere(config: Config) -> Iterator[str]:
    """What else makes it fit: more devices, the optimizer on the host."""
    ranks = world_size(config)
    more = next((n for n in (ranks << k for k in range(1, 13)) if next(candidates(config, n), None)), None)
    if more:
        yield f"no layout of {ranks:,} such devices fits; of {more:,} some do: plan.search=true plan.devices={more}"
    else:
        yield f"no layout of {ranks:,} such devices fits, nor of more"
    away = replace(config, optimizer=replace(config.optimizer, offload=True))
    if not config.optimizer.offload and fits(away):
        need = memory(away)
        yield f"would fit: optimizer.offload=true, with {gib(need.host)} of the host's memory per rank, and slower"


def changes(config: Config, candidate: Candidate) -> list[str]:
    """Keys in which a candidate differs."""
    return list(_changes(config, candidate.config))


def _changes(old: Config, new: Config) -> Iterator[str]:
    for key in ("dp", "sharding", "mp", "pp", "virtual_pp"):
        was, now = (getattr(job.parallel, f"{key}_degree") for job in (old, new))
        if was != now:
            yield f"parallel.{key}_degree={now}"
    matters = new.parallel.sharding_degree > 1 or new.parallel.pp_degree > 1  # a pipeline refuses stages 2 and 3
    if matters and old.parallel.sharding_stage != new.parallel.sharding_stage:
        yield f"parallel.sharding_stage={new.parallel.sharding_stage}"
    if old.parallel.sequence_parallel != new.parallel.sequence_parallel:
        yield f"parallel.sequence_parallel={str(new.parallel.sequence_parallel).lower()}"
    if old.trainer.micro_batch_size != new.trainer.micro_batch_size:
        yield f"trainer.micro_batch_size={new.trainer.micro_batch_size}"
    if old.model.recompute is not new.model.recompute:
        yield f"model.recompute={new.model.recompute.value}"
    if old.trainer.global_batch_size is None and global_batch_size(old) != _batch_without(new):
        yield f"trainer.global_batch_size={global_batch_size(new)}"
    if old.model.no_recompute_layers != new.model.no_recompute_layers:
        yield "model.no_recompute_layers=[]"


def _batch_without(config: Config) -> int:
    """Global batch that a layout would have if none were given."""
    return global_batch_size(replace(config, trainer=replace(config.trainer, global_batch_size=None)))
