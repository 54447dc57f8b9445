"""What travels between ranks in a step, and how long that takes on the device's links.

Collectives are rings: of n ranks each sends (n - 1) / n of the bytes to gather or to reduce-scatter them, and twice
that to all-reduce them (Thakur et al., 2005; ZeRO's traffic: Rajbhandari et al., 2020, section 7). This project's
exchanges wait: nothing of them is hidden behind computation.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpt.config.derived import accumulate_steps, micro_batch_size
from gpt.config.schema import Config, Recompute
from gpt.plan import flops
from gpt.plan.memory import element_size


@dataclass(frozen=True)
class Traffic:
    """Of one axis, on the rank of the pipeline that sends most.

    Attributes:
        axis: dp, sharding, mp, sp or pp.
        sent: bytes in a step.
        rate: bytes per second of the links it uses; None: not stated.
        slow: whether they leave the node.
    """

    axis: str
    sent: float
    rate: float | None
    slow: bool

    @property
    def seconds(self) -> float | None:
        """In a step."""
        return self.sent / self.rate if self.rate else None


def link(config: Config, axis: str) -> tuple[float | None, bool]:
    """Bytes per second of the links between the ranks of an axis, and whether they leave the node.

    Neighbours in rank differ in mp first, then sharding, pp, dp (Fleet's order). A group with k members on a node uses
    their k ports to the others, at most at the rate within a node; a hop of the pipeline uses one.
    """
    p, device = config.parallel, config.device
    degrees = {"mp": p.mp_degree, "sharding": p.sharding_degree, "pp": p.pp_degree, "dp": p.dp_degree}
    axis = "mp" if axis == "sp" else axis
    stride = 1
    for name, degree in degrees.items():
        if name == axis:
            break
        stride *= degree
    rates = (device.intra_node_gb_s, device.inter_node_gb_s)
    inside, between = (device.bandwidth_share * 1e9 * gb_s if gb_s else None for gb_s in rates)
    if stride * degrees[axis] <= device.per_node:
        return inside, False
    if inside is None or between is None:
        return between, True
    members = 1 if axis == "pp" else max(1, device.per_node // stride)
    return min(inside, members * between), True


def traffic(config: Config) -> list[Traffic]:
    """Of every axis with more than one rank."""
    p = config.parallel
    biggest = max(part.elements for part in flops.stage_parameters(config))
    found = []
    for axis, sent in (
        ("mp", layer_bytes(config) * _micro_layers(config) + head_bytes(config) * accumulate_steps(config)),
        ("sp", sp_bytes(config)),
        ("pp", 2 * hop_bytes(config) * accumulate_steps(config) * p.virtual_pp_degree + tied_bytes(config)),
        ("sharding", sharding_bytes(config, biggest)),
        ("dp", dp_bytes(config, biggest)),
    ):
        if sent:
            found.append(Traffic(axis, sent, *link(config, axis)))
    return found


def _micro_layers(config: Config) -> int:
    return config.model.layers // config.parallel.pp_degree * accumulate_steps(config)


def _tokens(config: Config) -> int:
    return config.data.seq_len * micro_batch_size(config)


def layer_bytes(config: Config, recompute: Recompute | None = None) -> float:
    """Sent by a rank over mp for one block and micro batch: two sums of activations each way, and what is recomputed.

    Sequence parallel gathers and reduce-scatters instead: the same bytes (Korthikanti et al., 2022, section 4.2.2).
    """
    n = config.parallel.mp_degree
    again = {Recompute.full: 2, Recompute.full_attn: 1}.get(recompute or config.model.recompute, 0)
    return (4 + again) * 2 * (n - 1) / n * _tokens(config) * config.model.hidden * element_size(config)


def head_bytes(config: Config) -> float:
    """Sent by a rank over mp for one micro batch outside the blocks: the sum of the looked-up rows, or the head's."""
    n = config.parallel.mp_degree
    return 2 * (n - 1) / n * _tokens(config) * config.model.hidden * element_size(config)


def sp_bytes(config: Config) -> float:
    """Sent once a step: the gradients of what all mp ranks have, of which each saw its positions."""
    p, m = config.parallel, config.model
    if not p.sequence_parallel:
        return 0.0
    common = m.layers // p.pp_degree * 6 * m.hidden
    return 2 * (p.mp_degree - 1) / p.mp_degree * common * element_size(config)


def hop_bytes(config: Config) -> float:
    """Sent by a rank to the next stage for one micro batch: an mp rank sends its part."""
    p = config.parallel
    return _tokens(config) * config.model.hidden * element_size(config) / p.mp_degree if p.pp_degree > 1 else 0.0


def tied_bytes(config: Config) -> float:
    """Sent once a step between first and last stage: the sum of the word table's two gradients."""
    return float(flops.stage_parameters(config)[-1].tied * element_size(config))


def dp_bytes(config: Config, elements: int) -> float:
    """Sent once a step: the sum of the gradients; at sharding stages 2 and 3 of those that a rank owns."""
    p = config.parallel
    if p.sharding_degree > 1 and p.sharding_stage >= 2:
        elements = max(part.owned for part in flops.stage_parameters(config))
    return 2 * (p.dp_degree - 1) / p.dp_degree * elements * element_size(config)


def sharding_bytes(config: Config, elements: int) -> float:
    """Sent in a step over the sharding group.

    Stage 1: the sum of the gradients, and the updated parameters. Stage 2: gradients go to their owner after every
    micro batch. Stage 3: so they do, and parameters come for every block's forward pass, its backward pass, and
    when it is recomputed; they need not be given back.
    """
    p, size, micros = config.parallel, element_size(config), accumulate_steps(config)
    share = (p.sharding_degree - 1) / p.sharding_degree * elements * size
    if p.sharding_stage == 1:
        return 3 * share
    if p.sharding_stage == 2:
        return (micros + 1) * share
    return micros * share * (4 if config.model.recompute is Recompute.full else 3)
