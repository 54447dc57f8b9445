"""The table of parameters, by logical name: the name in checkpoints, whatever the topology. Arithmetic, no Paddle.

The model, the optimizer, sharding, checkpoints, conversion and the plan read it. A kind of parameter is a row.
"""

from __future__ import annotations

import heapq
import re
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple

from gpt.config.derived import padded
from gpt.config.schema import Config, Model

WORD = "word.weight"
BLOCK = "layers.*."  # begins the name of a kind that every block has

REPLICAS, MP = "replicas", "mp"  # axes of the semi-auto engine's mesh


class Init(Enum):
    """Distribution of the initial values."""

    normal = "N(0, init_std^2)"
    residual = "N(0, init_std^2 / 2 layers) if model.scale_output_init (Radford et al., 2019), else as normal"
    constant = "as the layer is built: LayerNorm weights 1, biases 0"


@dataclass(frozen=True)
class Parameter:
    """A row of the table.

    Attributes:
        name: logical name, with * for the layer.
        shape: global shape, in the dimensions that ``global_shape`` knows.
        tp_axis: axis that is split over the tensor-parallel ranks; None: replicated.
        init: distribution of the initial values.
        weight_decay: whether the optimizer decays it: matrices and embeddings.
        part: of the model; the embedding is on the first pipeline stage, the head on the last.
        shared: the embedding that the head is tied to, so that the last stage has it, too.
    """

    name: str
    shape: tuple[str, ...]
    tp_axis: int | None
    init: Init
    weight_decay: bool
    part: Literal["embedding", "block", "head"]
    shared: bool = False


_H = "hidden"
# In the order of checkpoints. The columns of qkv are ordered by head, so that splitting columns splits heads.
TABLE = (
    Parameter("word.weight", ("vocab", _H), 0, Init.normal, True, "embedding", shared=True),
    Parameter("position.weight", ("positions", _H), None, Init.normal, True, "embedding"),
    Parameter("layers.*.norm1.weight", (_H,), None, Init.constant, False, "block"),
    Parameter("layers.*.norm1.bias", (_H,), None, Init.constant, False, "block"),
    Parameter("layers.*.attention.qkv.weight", (_H, "qkv"), 1, Init.normal, True, "block"),
    Parameter("layers.*.attention.qkv.bias", ("qkv",), 0, Init.constant, False, "block"),
    Parameter("layers.*.attention.out.weight", (_H, _H), 0, Init.residual, True, "block"),
    Parameter("layers.*.attention.out.bias", (_H,), None, Init.constant, False, "block"),
    Parameter("layers.*.norm2.weight", (_H,), None, Init.constant, False, "block"),
    Parameter("layers.*.norm2.bias", (_H,), None, Init.constant, False, "block"),
    Parameter("layers.*.fc1.weight", (_H, "ffn"), 1, Init.normal, True, "block"),
    Parameter("layers.*.fc1.bias", ("ffn",), 0, Init.constant, False, "block"),
    Parameter("layers.*.fc2.weight", ("ffn", _H), 0, Init.residual, True, "block"),
    Parameter("layers.*.fc2.bias", (_H,), None, Init.constant, False, "block"),
    Parameter("norm.weight", (_H,), None, Init.constant, False, "head"),
    Parameter("norm.bias", (_H,), None, Init.constant, False, "head"),
)
_ROWS = {row.name: row for row in TABLE}


def parameter(name: str) -> Parameter:
    """Return the row of a logical name.

    Example:
        >>> parameter("layers.3.attention.qkv.weight").tp_axis, parameter("layers.3.norm1.weight").tp_axis
        (1, None)
    """
    return _ROWS[re.sub(r"^layers\.\d+\.", BLOCK, name)]


class Dimensions(NamedTuple):
    """Dimensions of a model, hashable."""

    vocab: int
    hidden: int
    layers: int
    ffn: int
    positions: int

    @classmethod
    def of(cls, model: Model) -> Dimensions:
        """Take them from the configuration."""
        return cls(model.vocab, model.hidden, model.layers, model.ffn, model.positions)


def global_shape(row: Parameter, model: Dimensions, mp: int = 1) -> list[int]:
    """Return the shape of all ranks' shards together; the rows of the word table are padded for ``mp`` ranks."""
    sizes = {
        "vocab": padded(model.vocab, mp), "positions": model.positions, "hidden": model.hidden,
        "qkv": 3 * model.hidden, "ffn": model.ffn,
    }  # fmt: skip
    return [sizes[size] for size in row.shape]


def model_parameters(model: Dimensions) -> dict[str, Parameter]:
    """Return the rows of all parameters of a model, by logical name, in the order of checkpoints."""
    blocks = [row for row in TABLE if row.part == "block"]
    return {
        **{row.name: row for row in TABLE if row.part == "embedding"},
        **{row.name.replace("*", str(layer)): row for layer in range(model.layers) for row in blocks},
        **{row.name: row for row in TABLE if row.part == "head"},
    }


def parameter_shapes(config: Config) -> dict[str, list[int]]:
    """Return the shapes of all parameters as on one rank, which are those in checkpoints."""
    model = Dimensions.of(config.model)
    return {name: global_shape(row, model) for name, row in model_parameters(model).items()}


def owners(sizes: dict[str, int], degree: int) -> dict[str, int]:
    """Which rank of the sharding group updates each parameter: the largest first, to whom has least.

    Example:
        >>> owners({"a": 5, "b": 4, "c": 3, "d": 2}, 2)
        {'a': 0, 'b': 1, 'c': 1, 'd': 0}
    """
    load = [(0, rank) for rank in range(degree)]
    owner = {}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        least, owner[name] = load[0]
        heapq.heapreplace(load, (least + size, owner[name]))
    return owner
