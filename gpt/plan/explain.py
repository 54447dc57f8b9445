"""The layout that a number of devices should have, two others, and why."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from gpt.config.derived import accumulate_steps, global_batch_size, world_size
from gpt.config.rules import missing_device_keys
from gpt.config.schema import Config, DType, Recompute
from gpt.config.task_schemas import DeviceSpec, Peaks
from gpt.plan import devices as device_specs
from gpt.plan.communication import traffic
from gpt.plan.memory import Memory, memory, stages
from gpt.plan.search import FREE, GIB, HARDER, Candidate, LayoutConstraints, candidates, fits_memory, limit, rank
from gpt.plan.step_time import Cost, cost
from gpt.plan.summary import layout
from gpt.utils.errors import UserError

BEST = 3
ENDLESS_GIB = 1e9
SAME = 5e-4  # of a step: less than this is not a difference
SHARED_OUT = {
    "mp": "the sums inside every layer",
    "sp": "the sums of what sequence parallel has in common",
    "pp": "messages between stages",
    "sharding": "handing out gradients and weights",
    "dp": "the sum of all gradients",
}


@dataclass(frozen=True)
class AutoParallelResult:
    """What was chosen and from what.

    Attributes:
        best: of each product of degrees its best, the first is taken.
        number: how many layouts fit.
        devices: how many.
        where: what they are, in words.
        assumed: what is not known of the device and was put in its place; then times only compare.
        changed: keys beside the degrees that the command did not have so.
    """

    best: list[Candidate]
    number: int
    devices: int
    where: str
    assumed: list[str]
    changed: dict[str, Any] = field(default_factory=dict)

    @property
    def taken(self) -> Config:
        """The job with the layout that was chosen."""
        return self.best[0].config


def choose(config: Config, devices: int, where: str, given: LayoutConstraints = FREE) -> AutoParallelResult:
    """The fastest layout that fits; the degrees of ``config`` do not matter, its global batch and device do.

    Args:
        config: of the job, with ``device.memory_gib`` stated.
        devices: how many.
        where: what they are, in words.
        given: what may not be chosen.

    Raises:
        UserError: none is legal, or none fits: what comes nearest and what would help.
    """
    config, assumed = with_rates(config, devices)
    found = sorted((_timed(one) for one in candidates(config, devices, given)), key=rank)
    if not found:
        raise UserError.of([_nothing(config, devices, where, given)])
    distinct: dict[tuple[int, ...], Candidate] = {}
    for one in found:
        p = one.config.parallel
        key = (p.dp_degree, p.sharding_degree, p.sharding_stage, p.mp_degree, p.pp_degree)
        distinct.setdefault(key, one)
    return AutoParallelResult(list(distinct.values())[:BEST], len(found), devices, where, assumed)


def legal(config: Config, devices: int, given: LayoutConstraints = FREE) -> bool:
    """Whether the rules allow any layout of so many devices, whatever its memory."""
    return next(candidates(_endless(config), devices, given), None) is not None


def _endless(config: Config) -> Config:
    return replace(config, device=replace(config.device, memory_gib=ENDLESS_GIB))


def with_rates(config: Config, devices: int) -> tuple[Config, list[str]]:
    """The job on a device that states all a time needs, and what had to be assumed for that, in words."""
    device, dtype, assumed = config.device, config.precision.dtype, []
    cpu = device.name == "cpu"
    lacking = missing_device_keys(config, devices)
    bandwidth, inside, between = (10.0, 1.0, 10.0) if cpu else (1000.0, 25.0, 10.0)
    if "device.bandwidth_gb_s" in lacking:
        device = replace(device, bandwidth_gb_s=bandwidth)
        assumed.append(f"device.bandwidth_gb_s={bandwidth:g}")
    if "device.intra_node_gb_s" in lacking:
        device = replace(device, intra_node_gb_s=inside)
        assumed.append(f"device.intra_node_gb_s={inside:g}")
    if "device.inter_node_gb_s" in lacking:
        device = replace(device, inter_node_gb_s=between)
        assumed.append(f"device.inter_node_gb_s={between:g}")
    if f"device.peak_tflops.{dtype.value}" in lacking:
        value = _peak(device, dtype)
        device = replace(device, peak_tflops=Peaks(**{**vars(device.peak_tflops), dtype.value: value}))
        assumed.append(f"device.peak_tflops.{dtype.value}={value:.3g}")
    if config.optimizer.offload:
        assumed.append("the update on the host takes no longer than one on the device")
    return replace(config, device=device), assumed


def _peak(device: DeviceSpec, dtype: DType) -> float:
    """TFLOP/s where none are stated: of a GPU what its other type says (float32 an eighth of half precision)."""
    if device.name == "cpu":
        return 0.1
    half = device.peak_tflops.bf16 or device.peak_tflops.fp16 or 8 * (device.peak_tflops.fp32 or 12.5)
    return half / 8 if dtype is DType.fp32 else half


def _timed(one: Candidate) -> Candidate:
    """With a time also where the optimizer is offloaded, whose host's speed nobody states."""
    if one.cost or not one.config.optimizer.offload:
        return one
    return replace(one, cost=cost(replace(one.config, optimizer=replace(one.config.optimizer, offload=False))))


def _words(given: LayoutConstraints) -> str:
    keys = {"micro_batch_size": "trainer", "recompute": "model"}
    values = {key: value for key, value in vars(given).items() if value is not None}
    return " ".join(f"{keys.get(key, 'parallel')}.{key}={_word(value)}" for key, value in values.items())


def _word(value: object) -> str:
    return value.value if isinstance(value, Recompute) else str(value).lower()


def _nothing(config: Config, devices: int, where: str, given: LayoutConstraints) -> str:
    """Why there is no layout, what comes nearest, and what would help."""
    fixed = f" with {_words(given)}" if given != FREE else ""
    m, batch = config.model, config.trainer.global_batch_size
    about = f"parallel=auto: no layout of {where}{fixed}"
    most = LayoutConstraints(**{**vars(given), "recompute": given.recompute or Recompute.full})
    # Not one after another: what memory allows must not end the search for the least.
    nearest = min(candidates(_endless(config), devices, most), key=lambda one: memory(one.config).total, default=None)
    if nearest is None:
        free = given != FREE and legal(config, devices)
        fewer = next((n for n in range(devices - 1, 0, -1) if legal(config, n, given)), None)
        remedy = f"leave {_words(given)} away" if free else f"of fewer, plan.devices={fewer} has one" if fewer else ""
        return (
            f"{about} is possible: model.layers={m.layers}, model.heads={m.heads} and "
            f"trainer.global_batch_size={batch} do not divide so" + (f"; {remedy}" if remedy else "")
        )
    there = replace(nearest.config, device=config.device)
    room = limit(there)
    assert room is not None
    name = config.device.name or "the device"
    head = (
        f"{about} fits {max(room, 0) / GIB:.1f} GiB of {name}: the nearest, {layout(there)} "
        f"recompute={there.model.recompute.value} micro batch {there.trainer.micro_batch_size}, needs "
        f"{nearest.bytes / GIB:.1f} GiB"
    )
    return "; ".join([head, *_remedies(config, devices, given)])


def _remedies(config: Config, devices: int, given: LayoutConstraints) -> list[str]:
    found = []
    if given != FREE and next(candidates(config, devices), None):
        found.append(f"without {_words(given)} there is one that fits")
    away = replace(config, optimizer=replace(config.optimizer, offload=True))
    if not config.optimizer.offload and next(candidates(away, devices, given), None):
        found.append("optimizer.offload=true makes one fit, and is slower")
    more = (devices << k for k in range(1, 11))
    if not config.device.shared and (enough := next((n for n in more if next(candidates(config, n, given), None)), 0)):
        found.append(f"on {enough:,} such devices some fit")
    return found or ["a smaller model=..., or a device with more memory"]


def reasons(choice: AutoParallelResult) -> list[str]:
    """A sentence for each of the best: what it has before the next, and what the last lacks of the first."""
    best = choice.best
    if len(best) == 1:
        return ["the only product of degrees that fits and keeps what you gave"]
    found = []
    for number, (one, next_) in enumerate(itertools.pairwise(best), 2):
        gain = next_.seconds / one.seconds - 1
        said = f"{gain:.1%} faster than {number}, which spends {_spent(one, next_)}"
        found.append(f"{said if gain > SAME else f'as fast as {number} to {SAME:.2%}'}; {_memory(one, next_)}")
    first, last = best[0], best[-1]
    gain = last.seconds / first.seconds - 1
    said = (
        f"{gain:.1%} slower than 1: it spends {_spent(first, last)}" if gain > SAME else f"as fast as 1 to {SAME:.2%}"
    )
    return [*found, f"{said}; {_memory(last, first)}"]


def _spent(fast: Candidate, slow: Candidate) -> str:
    """On what the slower one spends most of what it takes longer, in shares of the faster one's step."""
    a, b = fast.cost, slow.cost
    assert a is not None
    assert b is not None
    parts = {
        b.compute - a.compute: _computing(fast.config, slow.config),
        b.exposed - a.exposed: _sending(fast.config, slow.config),
        b.bubble - a.bubble: f"waiting for other stages (pp {slow.config.parallel.pp_degree})",
    }
    more = max(parts)
    return f"{more / a.seconds:.1%} of a step more on {parts[more]}"


def _computing(fast: Config, slow: Config) -> str:
    if HARDER.index(slow.model.recompute) > HARDER.index(fast.model.recompute):
        return f"computing again ({slow.model.recompute.value})"
    if fast.parallel.sharding_degree > slow.parallel.sharding_degree:
        share = slow.parallel.sharding_degree
        return f"the update, of which a rank does 1/{share}" if share > 1 else "the update, which every rank does whole"
    if accumulate_steps(slow) > accumulate_steps(fast):
        return "smaller micro batches"
    return "what all ranks of mp compute alike" if slow.parallel.mp_degree > fast.parallel.mp_degree else "computing"


def _sending(fast: Config, slow: Config) -> str:
    less = {one.axis: one.seconds or 0.0 for one in traffic(fast)}
    more = {one.axis: (one.seconds or 0.0) - less.get(one.axis, 0.0) for one in traffic(slow)}
    axis = max(more, key=lambda name: more[name], default="dp")
    return f"{SHARED_OUT[axis]} ({axis})"


def _memory(one: Candidate, other: Candidate) -> str:
    room = limit(one.config)
    assert room is not None
    apart = one.bytes - other.bytes
    if abs(apart) < 0.01 * max(one.bytes, other.bytes):
        return "it needs as much memory"
    if apart < 0:
        return f"it needs {_gib(-apart)} less" + (", though memory is not short" if other.bytes < room / 2 else "")
    return f"it needs {_gib(apart)} more, and {_gib(room - one.bytes)} stay free"


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= 0.1 * GIB else f"{count / 2**20:.0f} MiB"


# Whether a job fits its devices, by how much, what bounds it, and what else would.

NEAREST = 3  # layouts to name


@dataclass(frozen=True)
class Verdict:
    """``fits`` is None where the device's memory is not stated. ``lines`` are for people, the first says it."""

    fits: bool | None
    lines: list[str]


def check_fit(config: Config) -> Verdict:
    """What is to be said of a job."""
    needs = stages(config)
    stage, need = max(enumerate(needs), key=lambda pair: pair[1].total)
    where = f" on stage {stage}" if config.parallel.pp_degree > 1 else ""
    largest = f"the most of it {_largest(need)}"
    room = limit(config)
    if room is None:
        lines = [f"{gib(need.total)}{where}, {largest}", *_devices_that_fit(config)]
        return Verdict(None, lines)
    device, spare = device_specs.of_rank(config), room - need.total
    kept = config.plan.reserve_gib / (world_size(config) if device.shared else 1)
    have = f"{gib(room)} of {device.name or 'the device'} ({device.memory_gib:.4g} less {kept:.3g} kept)"
    if spare >= 0:
        lines = [f"fits: {gib(need.total)}{where} within the {have}; {gib(spare)} to spare; {largest}"]
        time = cost(config)
        return Verdict(True, [*lines, *([f"the time is bound by: {bottleneck(time)} of a step"] if time else [])])
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


def bottleneck(time: Cost) -> str:
    """What takes most of a step."""
    parts = {"compute": time.compute, "exchanges": time.exposed, "waiting": time.bubble}
    name = max(parts, key=lambda part: parts[part])
    return f"{name} {parts[name] / time.seconds:.0%}"


def _devices_that_fit(config: Config) -> list[str]:
    """Which known devices would hold it."""
    holds: dict[bool, list[str]] = {True: [], False: []}
    for name, spec in device_specs.table().items():
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
    if not config.optimizer.offload and fits_memory(away):
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
