"""The GPT as a static model for Paddle Inference: plain operations on the logical parameters, traced by ``paddle.jit``.

The forward pass stands here a second time, for inference only; a test holds it to ``GPT.forward``.

    model.json     tokens BT -> logits BTV
    step.json      tokens BT, past -> logits BTV of the new tokens, and the longer past
    model.pdiparams   of both
    model_info.json, tokenizer.json

Shapes: B batch, T new positions, S positions so far, H hidden, N heads, D head size, E = 3 H, V vocabulary, L layers.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F

from gpt.config.parameters import WORD
from gpt.config.schema import Model
from gpt.runs.checkpoint.checkpoint import Checkpoint
from gpt.runs.checkpoint.reshard import ShardRange, ShardReader
from gpt.runs.checkpoint.shard_files import CheckpointReader
from gpt.runs.convert.export_weights import end_of_text
from gpt.utils.arrays import Array
from gpt.utils.files import atomic_directory, write_json


class Parameters(nn.Layer):  # type: ignore[misc]
    """The arrays of a model, some of them in eight bits.

    Args:
        source: by logical name, float32.
        model: its shape.
        small: keep matrices as int8 with a scale per output.
    """

    def __init__(self, source: ShardReader, model: Model, *, small: bool) -> None:
        super().__init__()
        self.scaled: set[str] = set()
        for name, shape in source.shapes.items():
            array = source[name]  # type: ignore[index]
            array = array[: model.vocab] if name == WORD else array
            key = name.replace(".", "_")
            if small and len(shape) == 2:
                packed = pack(array, axis(name))
                self.scaled.add(key)
                self.register_buffer(key, paddle.to_tensor(packed.numbers))
                self.register_buffer(f"{key}_scale", paddle.to_tensor(packed.scale))
            else:
                value = nn.initializer.Assign(array)
                self.add_parameter(key, self.create_parameter(list(array.shape), default_initializer=value))

    def value(self, name: str) -> Tensor:
        """A vector."""
        return getattr(self, name.replace(".", "_"))

    def product(self, x: Tensor, name: str) -> Tensor:
        """x times a matrix (its outputs may be its rows); scales belong to outputs, so they can be applied to those."""
        key = name.replace(".", "_")
        out = paddle.matmul(x, getattr(self, key).astype("float32"), transpose_y=axis(name) == 0)
        return out * getattr(self, f"{key}_scale") if key in self.scaled else out

    def rows(self, name: str, numbers: Tensor) -> Tensor:
        """Rows of a table."""
        key = name.replace(".", "_")
        if key not in self.scaled:
            return F.embedding(numbers, getattr(self, key))
        some = paddle.gather(getattr(self, key), numbers.flatten()).astype("float32")
        scale = paddle.gather(getattr(self, f"{key}_scale"), numbers.flatten()).unsqueeze(1)
        return (some * scale).reshape([*numbers.shape, some.shape[-1]])


class Static(nn.Layer):  # type: ignore[misc]
    """The forward pass.

    Args:
        parameters: of the model.
        model: its shape.
    """

    def __init__(self, parameters: Parameters, model: Model) -> None:
        super().__init__()
        self.parameters_ = parameters
        self.model = model

    def run(self, tokens_BT: Tensor, past_LKBSND: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Logits BTV of new positions after ``past``, and per layer the keys and values of all positions, KBSND."""
        get, m = self.parameters_, self.model
        T = tokens_BT.shape[1]
        S = past_LKBSND.shape[3] if past_LKBSND is not None else 0
        x_BTH = get.rows(WORD, tokens_BT) + get.rows("position.weight", paddle.arange(S, S + T))
        later_TS = paddle.arange(S + T).unsqueeze(0) > paddle.arange(S, S + T).unsqueeze(1)
        now = []
        for i in range(m.layers):
            normed = self._norm(x_BTH, f"layers.{i}.norm1")
            qkv_BTE = self._linear(normed, f"layers.{i}.attention.qkv")
            q, k, v = paddle.split(qkv_BTE.reshape([0, 0, m.heads, 3 * m.hidden // m.heads]), 3, axis=-1)
            if past_LKBSND is not None:
                k, v = (paddle.concat([past_LKBSND[i, j], new], axis=1) for j, new in enumerate((k, v)))
            now.append(paddle.stack([k, v]))
            mixed_BTH = self._attend(q, k, v, later_TS).reshape([0, 0, m.hidden])
            x_BTH = x_BTH + self._linear(mixed_BTH, f"layers.{i}.attention.out")
            inner = F.gelu(self._linear(self._norm(x_BTH, f"layers.{i}.norm2"), f"layers.{i}.fc1"), approximate=True)
            x_BTH = x_BTH + self._linear(inner, f"layers.{i}.fc2")
        return get.product(self._norm(x_BTH, "norm"), WORD), now

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = (self.parameters_.value(f"{name}.{part}") for part in ("weight", "bias"))
        return F.layer_norm(x, self.model.hidden, weight, bias, self.model.layer_norm_eps)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return self.parameters_.product(x, f"{name}.weight") + self.parameters_.value(f"{name}.bias")

    @staticmethod
    def _attend(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor, later_TS: Tensor) -> Tensor:
        q, k, v = (x.transpose([0, 2, 1, 3]) for x in (q_BTND, k_BSND, v_BSND))
        scores_BNTS = paddle.matmul(q * q.shape[-1] ** -0.5, k, transpose_y=True)
        scores_BNTS = paddle.where(later_TS, paddle.full([1], -1e9), scores_BNTS)
        return paddle.matmul(F.softmax(scores_BNTS, axis=-1), v).transpose([0, 2, 1, 3])


class Whole(nn.Layer):  # type: ignore[misc]
    """What ``model.json`` holds."""

    def __init__(self, core: Static) -> None:
        super().__init__()
        self.core = core

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits BTV of tokens BT."""
        return self.core.run(tokens, None)[0]


class Step(nn.Layer):  # type: ignore[misc]
    """What ``step.json`` holds."""

    def __init__(self, core: Static) -> None:
        super().__init__()
        self.core = core

    def forward(self, tokens: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Logits BTV of new tokens BT after ``past`` LKBSND (K: keys, values), and past with them."""
        logits, now = self.core.run(tokens, past)
        return logits, paddle.stack(now)


def export(found: Checkpoint, model: Model, output: Path, *, small: bool) -> list[str]:
    """Write the static model and what there is to know to use it; returns the names of the files.

    Raises:
        OSError: the disk is full or gone; nothing is left.
    """
    m = model
    core = Static(Parameters(found.model(), m, small=small), m)
    core.eval()
    tokens = paddle.static.InputSpec([None, None], "int64", "tokens")
    past = paddle.static.InputSpec([m.layers, 2, None, None, m.heads, m.hidden // m.heads], "float32", "past")
    with atomic_directory(output) as folder:
        for layer, name, inputs in ((Whole(core), "model", [tokens]), (Step(core), "step", [tokens, past])):
            layer.eval()
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")  # of Paddle's tracer, about itself
                paddle.jit.save(layer, str(folder / name), input_spec=inputs)
        _share(folder / "model.pdiparams", folder / "step.pdiparams")
        write_json(folder / "model_info.json", _info(found, model, small))
        if found.tokenizer:
            shutil.copyfile(found.tokenizer, folder / found.tokenizer.name)
        return sorted(path.name for path in folder.iterdir())


def _share(first: Path, second: Path) -> None:
    """Both programs have the same parameters in the same order, so one file of them is enough."""
    assert first.read_bytes() == second.read_bytes(), "the two programs do not store the same parameters"
    second.unlink()


def _info(found: Checkpoint, m: Model, small: bool) -> dict[str, Any]:
    return {
        "format": 1,
        "name": m.name,
        "step": found.state["step"],
        "vocab": m.vocab,
        "positions": m.positions,
        "layers": m.layers,
        "heads": m.heads,
        "head_size": m.hidden // m.heads,
        "eot": end_of_text(found),
        "weights": "int8" if small else "float32",
        "tokenizer": found.tokenizer.name if found.tokenizer else None,
        "parameters": "model.pdiparams",
        "programs": {"model": "model.json", "step": "step.json"},
    }


# Matrices in eight bits: whole numbers from -127 to 127, and a float32 scale per output.

LARGEST = 127


@dataclass(frozen=True)
class Packed:
    """A matrix: int8 ``numbers`` and a float32 ``scale`` per index of ``axis``."""

    numbers: Array
    scale: Array
    axis: int

    def unpacked(self) -> Array:
        """Float32 again."""
        values: Array = self.numbers.astype(np.float32) * np.expand_dims(self.scale, 1 - self.axis)
        return values


def axis(name: str) -> int:
    """Along which axis the outputs of a parameter are: rows of a table are tokens or positions, columns else."""
    return 0 if name in ("word.weight", "position.weight") else 1


def pack(matrix: Array, along: int) -> Packed:
    """Nearest whole multiples of 1/127 of the largest value of each output.

    Example:
        >>> pack(np.array([[1.0, -3.0], [0.5, 0.3]], np.float32), along=1).numbers.tolist()
        [[127, -127], [64, 13]]
    """
    scale = np.abs(matrix).max(axis=1 - along).astype(np.float32) / LARGEST
    scale[scale == 0] = 1.0
    numbers = np.rint(matrix / np.expand_dims(scale, 1 - along)).astype(np.int8)
    return Packed(numbers, scale, along)


class Rounded(CheckpointReader):
    """A checkpoint's arrays as they are after packing: to measure what it costs."""

    def read(self, name: str, where: ShardRange) -> Array:
        """A slice, rounded together with the whole."""
        shape = self.index[name]["shape"]
        array = super().read(name, ShardRange(0, 0, shape[0]))
        if len(shape) == 2:
            array = pack(array, axis(name)).unpacked()
        return array[tuple(slice(begin, end) for begin, end in where.box(shape))]
