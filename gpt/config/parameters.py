"""Names and shapes of all parameters, and which rank of a sharding group updates each: arithmetic, no Paddle."""

from __future__ import annotations

import heapq

from gpt.config.derived import padded
from gpt.config.schema import Config

WORD = "word.weight"  # the table that the head is tied to


def parameter_shapes(config: Config) -> dict[str, list[int]]:
    """Of all parameters of the model, as one process has them and a checkpoint holds them."""
    m = config.model
    return shapes_of(m.vocab, m.hidden, m.layers, m.ffn, m.positions)


def shapes_of(vocab: int, hidden: int, layers: int, ffn: int, positions: int) -> dict[str, list[int]]:
    """The same from the model's shape; the table's rows are padded as on one rank."""
    blocks = {f"layers.{i}.{k}": v for i in range(layers) for k, v in block_shapes(hidden, ffn).items()}
    norm = {"norm.weight": [hidden], "norm.bias": [hidden]}
    return {WORD: [padded(vocab, 1), hidden], "position.weight": [positions, hidden], **blocks, **norm}


def block_shapes(hidden: int, ffn: int) -> dict[str, list[int]]:
    """Of one block's parameters."""
    norm = {"weight": [hidden], "bias": [hidden]}
    return {
        **{f"norm1.{k}": v for k, v in norm.items()},
        "attention.qkv.weight": [hidden, 3 * hidden],
        "attention.qkv.bias": [3 * hidden],
        "attention.out.weight": [hidden, hidden],
        "attention.out.bias": [hidden],
        **{f"norm2.{k}": v for k, v in norm.items()},
        "fc1.weight": [hidden, ffn],
        "fc1.bias": [ffn],
        "fc2.weight": [ffn, hidden],
        "fc2.bias": [hidden],
    }


def is_tensor_parallel(name: str) -> bool:
    """Whether the mp ranks share a parameter out.

    Example:
        >>> [name for name in block_shapes(8, 32) if is_tensor_parallel(name)][-3:]
        ['fc1.weight', 'fc1.bias', 'fc2.weight']
    """
    return name == WORD or name.endswith((".out.weight", "fc2.weight")) or ".qkv." in name or "fc1." in name


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


# What the semi-auto engine is told about the model: the whole of the annotation, by logical parameter name.

REPLICAS, MP = "replicas", "mp"

# The end of a name, and the axis of the parameter that is shared out along ``mp``.
TP_AXES = {
    "word.weight": 0,  # rows: tokens
    "attention.qkv.weight": 1,  # columns: heads
    "attention.qkv.bias": 0,
    "attention.out.weight": 0,  # rows: heads
    "fc1.weight": 1,
    "fc1.bias": 0,
    "fc2.weight": 0,
}


def tp_axis(name: str) -> int | None:
    """The axis along which the mp ranks share a parameter out; None if each has all of it.

    Example:
        >>> tp_axis("layers.3.attention.qkv.weight"), tp_axis("layers.3.norm1.weight")
        (1, None)
    """
    return next((axis for end, axis in TP_AXES.items() if name.endswith(end)), None)


def has_weight_decay(name: str) -> bool:
    """Whether weight decay applies to a parameter: matrices and embeddings, not biases and LayerNorm."""
    return not name.endswith(".bias") and ".norm" not in f".{name}"
