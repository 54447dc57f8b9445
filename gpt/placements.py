"""What the semi-auto engine is told about the model: the whole of the annotation, by logical parameter name.

Every parameter is placed on a mesh (of a pipeline: of its stage's ranks) whose axes are ``replicas`` (dp_degree x
sharding_degree) and ``mp``. Along ``mp`` it is shared out as this table says, or every rank has all of it; along
``replicas`` every rank has all of it, until a sharding stage shares it out too. What happens to activations the engine
finds out by itself.
"""

from __future__ import annotations

REPLICAS, MP = "replicas", "mp"

# The end of a name, and the axis of the parameter that is shared out along ``mp``.
SPLIT = {
    "word.weight": 0,  # rows: tokens
    "attention.qkv.weight": 1,  # columns: heads
    "attention.qkv.bias": 0,
    "attention.out.weight": 0,  # rows: heads
    "fc1.weight": 1,
    "fc1.bias": 0,
    "fc2.weight": 0,
}


def split_axis(name: str) -> int | None:
    """The axis along which the mp ranks share a parameter out; None if each has all of it.

    Example:
        >>> split_axis("layers.3.attention.qkv.weight"), split_axis("layers.3.norm1.weight")
        (1, None)
    """
    return next((axis for end, axis in SPLIT.items() if name.endswith(end)), None)
