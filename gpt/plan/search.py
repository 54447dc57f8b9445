"""Layouts of a number of devices, ranked by predicted time among those that fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gpt.config import Config, Parallel, Recompute, UserError, global_batch_size, micro_batch_size
from gpt.config_plan import DeviceSpec
from gpt.plan.cost import Cost, cost, missing
from gpt.plan.devices import of_rank
from gpt.plan.footprint import memory
from gpt.rules import rule_problems

GIB = 2**30
HARDER = (Recompute.none, Recompute.core_attn, Recompute.full_attn, Recompute.full)  # each keeps less, computes more
MOST_MICRO = 64  # samples of a micro batch: beyond, products are as large as they need to be


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
    """Bytes of a device that a job may use; None where its memory is not stated."""
    gib = of_rank(config).memory_gib
    return (gib - config.plan.reserve_gib) * GIB if gib else None


def fits(config: Config) -> bool | None:
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
    lacking = [*missing(config, devices), *([] if config.device.memory_gib else ["device.memory_gib"])]
    if lacking:
        raise UserError.of([f"a search needs {', '.join(lacking)}: choose a device with device=..."])
    # Of equals, larger micro batches: larger products and fewer of them, which the times do not know.
    return sorted(candidates(config, devices), key=lambda one: (one.seconds, -micro_batch_size(one.config), one.bytes))


def candidates(config: Config, devices: int) -> Iterator[Candidate]:
    """The same in no order, and also without times; ``device.memory_gib`` must be stated."""
    config = replace(config, trainer=replace(config.trainer, global_batch_size=global_batch_size(config)))
    for layout in _layouts(config, devices):
        yield from _fitting(layout)


def _divisors(of: int) -> list[int]:
    return [d for d in range(1, of + 1) if of % d == 0]


def _layouts(config: Config, devices: int) -> Iterator[Config]:
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
                        by_position = mp > 1 and length % mp == 0
                        degrees = Parallel(replicas // sharding, sharding, stage, mp, pp, virtual, by_position)
                        yield replace(config, parallel=degrees)


def _fitting(layout: Config) -> Iterator[Candidate]:
    """The micro batches that fit, each with the least recomputation that makes it fit."""
    p, batch = layout.parallel, global_batch_size(layout)
    room = limit(layout)
    assert room is not None
    for micro in _divisors(batch // (p.dp_degree * p.sharding_degree)):
        if micro > MOST_MICRO:
            return
        trainer = replace(layout.trainer, micro_batch_size=micro)
        fitted = False
        for how in HARDER:
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


def overrides(config: Config) -> list[str]:
    """Keys that make the layout of ``config`` from ``parallel=single``."""
    p, m, trainer = config.parallel, config.model, config.trainer
    degrees = {
        "dp_degree": p.dp_degree,
        "sharding_degree": p.sharding_degree,
        "sharding_stage": p.sharding_stage,
        "mp_degree": p.mp_degree,
        "pp_degree": p.pp_degree,
        "virtual_pp_degree": p.virtual_pp_degree,
    }
    keys = [f"parallel.{key}={value}" for key, value in degrees.items() if value > 1]
    keys += ["parallel.sequence_parallel=true"] if p.sequence_parallel else []
    keys += [f"trainer.micro_batch_size={trainer.micro_batch_size}"]
    keys += [f"trainer.global_batch_size={global_batch_size(config)}", f"model.recompute={m.recompute.value}"]
    return ["parallel=single", *keys]
