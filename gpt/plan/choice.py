"""The layout that a number of devices should have, two others, and why."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from gpt.config import Config, DType, Recompute, UserError, accumulate_steps
from gpt.config_plan import DeviceSpec, Peaks
from gpt.plan.cost import cost, missing
from gpt.plan.footprint import memory
from gpt.plan.search import FREE, GIB, HARDER, Candidate, Given, candidates, limit, rank
from gpt.plan.summary import layout
from gpt.plan.traffic import traffic

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
class Choice:
    """What was chosen and from what.

    Attributes:
        best: of each product of degrees its best, the first is taken.
        number: how many layouts fit.
        devices: how many.
        where: what they are, in words.
        assumed: what is not known of the device and was put in its place; then times only compare.
    """

    best: list[Candidate]
    number: int
    devices: int
    where: str
    assumed: list[str]

    @property
    def taken(self) -> Config:
        """The job with the layout that was chosen."""
        return self.best[0].config


def choose(config: Config, devices: int, where: str, given: Given = FREE) -> Choice:
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
    return Choice(list(distinct.values())[:BEST], len(found), devices, where, assumed)


def legal(config: Config, devices: int, given: Given = FREE) -> bool:
    """Whether the rules allow any layout of so many devices, whatever its memory."""
    return next(candidates(_endless(config), devices, given), None) is not None


def _endless(config: Config) -> Config:
    return replace(config, device=replace(config.device, memory_gib=ENDLESS_GIB))


def with_rates(config: Config, devices: int) -> tuple[Config, list[str]]:
    """The job on a device that states all a time needs, and what had to be assumed for that, in words."""
    device, dtype, assumed = config.device, config.precision.dtype, []
    cpu = device.name == "cpu"
    lacking = missing(config, devices)
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


def _words(given: Given) -> str:
    keys = {"micro_batch_size": "trainer", "recompute": "model"}
    values = {key: value for key, value in vars(given).items() if value is not None}
    return " ".join(f"{keys.get(key, 'parallel')}.{key}={_word(value)}" for key, value in values.items())


def _word(value: object) -> str:
    return value.value if isinstance(value, Recompute) else str(value).lower()


def _nothing(config: Config, devices: int, where: str, given: Given) -> str:
    """Why there is no layout, what comes nearest, and what would help."""
    fixed = f" with {_words(given)}" if given != FREE else ""
    m, batch = config.model, config.trainer.global_batch_size
    about = f"parallel=auto: no layout of {where}{fixed}"
    most = Given(**{**vars(given), "recompute": given.recompute or Recompute.full})
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


def _remedies(config: Config, devices: int, given: Given) -> list[str]:
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


def reasons(choice: Choice) -> list[str]:
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
