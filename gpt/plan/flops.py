"""Parameters and matrix products, counted. h hidden, f ffn, L layers, s sequence, a heads, V rows of the table."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from gpt.config.derived import padded_vocab
from gpt.config.parameters import BLOCK, TABLE, WORD, Dimensions, Parameter, global_shape, model_parameters, owners
from gpt.config.schema import Config, Recompute


def parameters(config: Config, *, padded: bool = True) -> int:
    """Number of parameters: (V + S) h + L (4 h^2 + 2 h f + 9 h + f) + 2 h, the head tied to the embedding.

    Args:
        config: h hidden, f ffn, L layers, S positions; V is the padded vocabulary.
        padded: False counts ``model.vocab`` rows only.
    """
    m = config.model
    vocab = padded_vocab(config) if padded else m.vocab
    block = 4 * m.hidden**2 + 2 * m.hidden * m.ffn + 9 * m.hidden + m.ffn
    return (vocab + m.positions) * m.hidden + m.layers * block + 2 * m.hidden


@dataclass(frozen=True)
class Stage:
    """Parameters that one rank of a pipeline stage has, after the mp split.

    Attributes:
        elements: all of them.
        owned: those that the fullest rank of the sharding group updates.
        outside: those that are not in a block: tables, the last norm.
        fetched: those of them that the fullest rank at sharding stage 3 does not own.
        largest: of a single tensor.
        widest: of a single tensor of a block.
        tied: of the word table if it is here as a copy for the head only.
    """

    elements: int
    owned: int
    outside: int
    fetched: int
    largest: int
    widest: int
    tied: int


def block_elements(config: Config) -> int:
    """Parameters of one block on one mp rank."""
    return sum(_block(Dimensions.of(config.model), config.parallel.mp_degree).values())


def stage_parameters(config: Config) -> tuple[Stage, ...]:
    """For every pipeline stage, the first first. Searches ask for the same ones again and again: they are kept."""
    p = config.parallel
    return _stages(Dimensions.of(config.model), p.mp_degree, p.pp_degree, p.virtual_pp_degree, p.sharding_degree)


def layers_of_stage(layers: int, pp: int, virtual: int, stage: int) -> list[int]:
    """Numbers of the blocks of a pipeline stage: its chunk c has those of virtual stage c pp + stage.

    Example:
        >>> layers_of_stage(8, 2, 2, 0)
        [0, 1, 4, 5]
    """
    size = layers // (pp * virtual)
    return [i for c in range(virtual) for i in range((c * pp + stage) * size, (c * pp + stage + 1) * size)]


def _local_elements(row: Parameter, model: Dimensions, mp: int) -> int:
    return math.prod(global_shape(row, model, mp)) // (1 if row.tp_axis is None else mp)


def _block(model: Dimensions, mp: int) -> dict[str, int]:
    """Return the elements of one block's parameters on one mp rank, by the end of their names."""
    rows = [row for row in TABLE if row.part == "block"]
    return {row.name.removeprefix(BLOCK): _local_elements(row, model, mp) for row in rows}


@functools.lru_cache(maxsize=4096)
def _stages(model: Dimensions, mp: int, pp: int, virtual: int, degree: int) -> tuple[Stage, ...]:
    block = _block(model, mp)
    rows = [(row, _local_elements(row, model, mp)) for row in TABLE if row.part != "block"]
    first = {row.name: elements for row, elements in rows if row.part == "embedding"}
    last = {row.name: elements for row, elements in rows if row.part == "head" or row.shared}
    found = []
    for stage in range(pp):
        outside = {**(first if stage == 0 else {}), **(last if stage == pp - 1 else {})}
        elements = sum(outside.values()) + model.layers // pp * sum(block.values())
        owned, fetched = elements, 0
        if degree > 1:
            owner, load = _owner(model, degree), [0] * degree
            for name, count in outside.items():
                load[owner[name]] += count
            away = [sum(outside.values()) - own for own in load]
            for layer in layers_of_stage(model.layers, pp, virtual, stage):
                for name, count in block.items():
                    load[owner[f"layers.{layer}.{name}"]] += count
            owned = max(load)
            _, fetched = max((4 * load[rank] + away[rank], away[rank]) for rank in range(degree))
        tied = outside[WORD] if 0 < stage == pp - 1 else 0
        widest = max(block.values())
        largest = max([widest, *outside.values()])
        found.append(Stage(elements, owned, sum(outside.values()), fetched, largest, widest, tied))
    return tuple(found)


@functools.lru_cache(maxsize=64)
def _owner(model: Dimensions, degree: int) -> dict[str, int]:
    shapes = {name: global_shape(row, model) for name, row in model_parameters(model).items()}
    return owners({name: math.prod(shape) for name, shape in shapes.items()}, degree)


def forward_flops(config: Config, *, causal: bool = True) -> float:
    """Matmul FLOPs of one token in the forward pass of one block: 2 (4 h^2 + 2 h f), and 4 h s of attention or half."""
    m = config.model
    return 2.0 * (4 * m.hidden**2 + 2 * m.hidden * m.ffn) + attention_flops(config, causal=causal)


def attention_flops(config: Config, *, causal: bool = True) -> float:
    """Of q k' and of the mix of v, forward, one block, one token: 4 h s for the full square."""
    return (2.0 if causal else 4.0) * config.model.hidden * config.data.seq_len


def head_flops(config: Config) -> float:
    """Of the head, forward, one token."""
    return 2.0 * padded_vocab(config) * config.model.hidden


def flops_per_token(config: Config, *, causal: bool = True) -> float:
    """Matmul FLOPs of one training token, forward and backward: 6 N_matmul + 6 L h s.

    N_matmul are the weights that multiply (blocks and head). Attention is counted causally, half the square
    (as Megatron-LM does since 2025); ``causal=False`` counts the whole, 12 L h s (Chowdhery et al., 2022, PaLM,
    appendix B; Narayanan et al., 2021). Recomputation is not counted.
    """
    return 3 * (config.model.layers * forward_flops(config, causal=causal) + head_flops(config))


def hardware_flops_per_token(config: Config, *, causal: bool = True) -> float:
    """``flops_per_token`` and what is computed again in the backward pass."""
    parts = kinds(config, list(range(config.model.layers)))
    again = sum(number * recomputed_flops(config, how, causal=causal) for how, number in parts.items())
    head = head_flops(config) if config.model.loss_chunk else 0.0
    return flops_per_token(config, causal=causal) + again + head


def recomputed_flops(config: Config, how: Recompute, *, causal: bool = True) -> float:
    """Forward FLOPs of one token that a block computes twice."""
    m = config.model
    return {
        Recompute.none: 0.0,
        Recompute.core_attn: attention_flops(config, causal=causal),
        Recompute.full_attn: 8.0 * m.hidden**2 + attention_flops(config, causal=causal),
        Recompute.full: forward_flops(config, causal=causal),
    }[how]


def kinds(config: Config, layers: list[int]) -> dict[Recompute, int]:
    """How many of some blocks recompute what: few kinds, so that nobody has to ask block by block."""
    m = config.model
    exempt = len(set(m.no_recompute_layers) & set(layers)) if m.recompute is not Recompute.none else 0
    found = {Recompute.none: exempt, m.recompute: len(layers) - exempt}
    return {how: number for how, number in found.items() if number}


def first_loss(config: Config) -> float:
    """Expected loss before training: ln V + init_std^2 h / 2.

    After the last LayerNorm a logit is a sum of h products of a unit-variance feature and an N(0, init_std^2)
    weight, so logits are N(0, init_std^2 h), and E ln sum exp of V such is ln V plus half their variance.
    """
    return math.log(config.model.vocab) + config.model.init_std**2 * config.model.hidden / 2
