"""Layouts of a number of devices, ranked by predicted time among those that fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gpt.config.derived import global_batch_size, micro_batch_size, world_size
from gpt.config.rules import missing_device_keys, rule_problems
from gpt.config.schema import Config, Parallel, Recompute
from gpt.config.task_schemas import DeviceSpec
from gpt.plan.memory import memory
from gpt.plan.step_time import Cost, cost
from gpt.utils.errors import UserError

GIB = 2**30
HARDER = (Recompute.none, Recompute.core_attn, Recompute.full_attn, Recompute.full)  # each keeps less, computes more
MOST_MICRO = 64  # samples of a micro batch: beyond, products are as large as they need to be


@dataclass(frozen=True)
class LayoutConstraints:
    """What a search may not choose, because the user did; None: may be chosen."""

    dp_degree: int | None = None
    sharding_degree: int | None = None
    sharding_stage: int | None = None
    mp_degree: int | None = None
    pp_degree: int | None = None
    virtual_pp_degree: int | None = None
    sequence_parallel: bool | None = None
    micro_batch_size: int | None = None
    recompute: Recompute | None = None

    def allows(self, parallel: Parallel) -> bool:
        """Whether a layout has what is given."""
        return all(getattr(self, key, None) in (None, value) for key, value in vars(parallel).items())


FREE = LayoutConstraints()


@dataclass(frozen=True)
class Candidate:
    """A layout that fits: the job with it, bytes on its fullest rank, and what a step takes if that can be said."""

    config: Config
    bytes: int
    cost: Cost | None

    @property
    def seconds(self) -> float:
        """Of a step; 0 where that cannot be said."""
        return self.cost.seconds if self.cost else 0.0

    @property
    def overrides(self) -> list[str]:
        """What to type for it, beside the model."""
        return overrides(self.config)


def limit(config: Config) -> float | None:
    """Bytes of its device that a rank may use, of a shared one its part; None where its memory is not stated."""
    gib, shared = config.device.memory_gib, config.device.shared
    return (gib - config.plan.reserve_gib) * GIB / (world_size(config) if shared else 1) if gib else None


def fits_memory(config: Config) -> bool | None:
    """Whether the fullest rank's bytes are within ``limit``; None where that is not known."""
    room = limit(config)
    return memory(config).total <= room if room is not None else None


def search(config: Config, devices: int, device: DeviceSpec | None = None) -> list[Candidate]:
    """All layouts of so many devices that the rules allow and that fit, the fastest first.

    The model, the global batch and the element type are given; degrees, sharding stage, virtual stages, sequence
    parallel, micro batch and recomputation are searched. Pruned is what cannot win: recomputing more than is needed to
    fit, mp without sequence parallel where that is possible (the same traffic, more kept), micro batches beyond the
    first that does not fit.

    Args:
        config: of the job.
        devices: how many.
        device: instead of ``config.device``.

    Raises:
        UserError: the device does not state what times and bytes need.
    """
    config = replace(config, device=device) if device else config
    lacking = [*missing_device_keys(config, devices), *([] if config.device.memory_gib else ["device.memory_gib"])]
    if lacking:
        raise UserError.of([f"a search needs {', '.join(lacking)}: choose a device with device=..."])
    return sorted(candidates(config, devices), key=rank)


def rank(candidate: Candidate) -> tuple[float, int, int]:
    """The order of candidates. Of equals, larger micro batches: fewer, larger products, which the times do not know."""
    return candidate.seconds, -micro_batch_size(candidate.config), candidate.bytes


def candidates(config: Config, devices: int, given: LayoutConstraints = FREE) -> Iterator[Candidate]:
    """The same in no order, and also without times; ``device.memory_gib`` must be stated."""
    config = replace(config, trainer=replace(config.trainer, global_batch_size=global_batch_size(config)))
    for layout in _layouts(config, devices, given):
        yield from _fitting(layout, given)


def _divisors(of: int) -> list[int]:
    return [d for d in range(1, of + 1) if of % d == 0]


def _layouts(config: Config, devices: int, given: LayoutConstraints) -> Iterator[Config]:
    """Every product of degrees, with every sharding stage and number of virtual stages."""
    m, batch, length = config.model, global_batch_size(config), config.data.seq_len
    for mp in _divisors(devices):
        if m.heads % mp or m.ffn % mp:
            continue
        for pp in _divisors(devices // mp):
            replicas = devices // (mp * pp)
            if m.layers % pp or batch % replicas:
                continue
            for sharding in _divisors(replicas):
                for stage in (1, 2, 3) if sharding > 1 and pp == 1 else (1,):
                    for virtual in _divisors(m.layers // pp) if pp > 2 else (1,):
                        by_position = mp > 1 and length % mp == 0 and given.sequence_parallel is not False
                        degrees = Parallel(replicas // sharding, sharding, stage, mp, pp, virtual, by_position)
                        if given.allows(degrees):
                            yield replace(config, parallel=degrees)


def _fitting(layout: Config, given: LayoutConstraints) -> Iterator[Candidate]:
    """The micro batches that fit, each with the least recomputation that makes it fit."""
    p, batch = layout.parallel, global_batch_size(layout)
    room = limit(layout)
    assert room is not None
    for micro in _divisors(batch // (p.dp_degree * p.sharding_degree)):
        if given.micro_batch_size not in (None, micro):
            continue
        if micro > MOST_MICRO and given.micro_batch_size is None:
            return
        trainer = replace(layout.trainer, micro_batch_size=micro)
        fitted = False
        for how in (given.recompute,) if given.recompute else HARDER:
            exempt = [] if how is Recompute.none else layout.model.no_recompute_layers
            model = replace(layout.model, recompute=how, no_recompute_layers=exempt)
            config = replace(layout, model=model, trainer=trainer)
            need = memory(config).total
            if need <= room:
                fitted = True
                if not rule_problems(config):
                    yield Candidate(config, need, cost(config))
                break
        if not fitted:
            return


def degree_keys(p: Parallel) -> list[str]:
    """Keys that make these degrees from ``parallel=single``."""
    numbers = {key: value for key, value in vars(p).items() if type(value) is int}
    keys = [f"parallel.{key}={value}" for key, value in numbers.items() if value > 1]
    return [*keys, *(["parallel.sequence_parallel=true"] if p.sequence_parallel else [])]


def overrides(config: Config) -> list[str]:
    """Keys that make the layout of ``config`` from ``parallel=single``."""
    keys = [*degree_keys(config.parallel), f"trainer.micro_batch_size={config.trainer.micro_batch_size}"]
    keys += [
        f"trainer.global_batch_size={global_batch_size(config)}",
        f"model.recompute={config.model.recompute.value}",
    ]
    return ["parallel=single", *keys]
