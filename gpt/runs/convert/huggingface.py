"""GPT-2 as Hugging Face's ``transformers`` stores it: names, layout and ``config.json``, both ways.

Its linear layers ("Conv1D") have weights [in, out] as ours do. ``c_attn`` has all queries, then all keys, then all
values; ours has q_j k_j v_j head by head.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpt.config.schema import Model
from gpt.runs.convert import tensor_files
from gpt.runs.convert.tensor_files import Tensor, Tensors
from gpt.utils.arrays import Array
from gpt.utils.errors import UserError

TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")  # two names of the same function
FILES = ("model.safetensors", "model.safetensors.index.json")
TORCH_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")  # refused, with the remedy
BLOCK = {
    "ln_1": "norm1", "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.out",
    "ln_2": "norm2", "mlp.c_fc": "fc1", "mlp.c_proj": "fc2",
}  # fmt: skip


def names(layers: int) -> Iterator[tuple[str, str]]:
    """Yield our name and theirs of every parameter."""
    yield "word.weight", "wte.weight"
    yield "position.weight", "wpe.weight"
    for i in range(layers):
        for theirs, ours in BLOCK.items():
            for part in ("weight", "bias"):
                yield f"layers.{i}.{ours}.{part}", f"h.{i}.{theirs}.{part}"
    for part in ("weight", "bias"):
        yield f"norm.{part}", f"ln_f.{part}"


def interleave_qkv(qkv: Array, heads: int) -> Array:
    """Reorder the last axis from q|k|v, each with all heads, to q_j k_j v_j head by head.

    Example:
        >>> interleave_qkv(np.array([1, 2, 3, 4, 5, 6]), heads=2).tolist()
        [1, 3, 5, 2, 4, 6]
    """
    split = qkv.reshape(*qkv.shape[:-1], 3, heads, -1)
    return np.ascontiguousarray(np.swapaxes(split, -3, -2)).reshape(qkv.shape)


def deinterleave_qkv(qkv: Array, heads: int) -> Array:
    """Invert ``interleave_qkv``."""
    split = qkv.reshape(*qkv.shape[:-1], heads, 3, -1)
    return np.ascontiguousarray(np.swapaxes(split, -3, -2)).reshape(qkv.shape)


def find_file(source: Path) -> Path | None:
    """Return the file of weights that ``source`` names or holds."""
    if source.is_file():
        return source
    return next((source / name for name in (*FILES, *TORCH_FILES) if (source / name).is_file()), None)


def open_tensors(file: Path) -> Tensors:
    """Return the tensors of the model by their bare names, without buffers.

    Raises:
        UserError: a file is damaged or refused, or the head is not tied to the word table.
    """
    tensors = tensor_files.open_shards(file) if file.name.endswith(".index.json") else tensor_files.open_file(file)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    head = bare.pop("lm_head.weight", None)
    word = bare.get("wte.weight")
    if head and word and (head.shape != word.shape or not np.array_equal(head.read(), word.read())):
        raise UserError(f"{file}: lm_head.weight is not wte.weight: this GPT has no head of its own (tied head only)")
    # Older files also hold the causal mask.
    return {name: tensor for name, tensor in bare.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}


def read_config(source: Path, like: Model) -> Model:
    """Read the model's shape from the ``config.json`` beside the weights.

    Args:
        source: the folder, or a file in it.
        like: gives the settings that the file does not have.

    Raises:
        UserError: listing what this GPT does not do.
    """
    path = (source if source.is_dir() else source.parent) / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: not there; it says the shape (n_head cannot be seen in the weights)")
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if problems := list(_problems(stored)):
            raise UserError("; ".join(f"{path}: {problem}" for problem in problems))
        hidden = int(stored["n_embd"])
        return Model(
            name=source.name if source.is_dir() else source.parent.name,
            vocab=int(stored["vocab_size"]),
            hidden=hidden,
            layers=int(stored["n_layer"]),
            heads=int(stored["n_head"]),
            ffn=int(stored.get("n_inner") or 4 * hidden),
            positions=int(stored.get("n_positions") or stored["n_ctx"]),
            dropout=float(stored.get("resid_pdrop", 0.1)),
            attention_dropout=float(stored.get("attn_pdrop", 0.1)),
            init_std=float(stored.get("initializer_range", 0.02)),
            scale_output_init=True,
            layer_norm_eps=float(stored.get("layer_norm_epsilon", 1e-5)),
            recompute=like.recompute,
            no_recompute_layers=[],
            loss_chunk=like.loss_chunk,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the config.json of a GPT-2 ({type(error).__name__}: {error})") from error


def _problems(stored: dict[str, Any]) -> Iterator[str]:
    kind, activation = stored.get("model_type", "gpt2"), stored.get("activation_function", "gelu_new")
    if kind != "gpt2":
        yield f"model_type is {kind}: only gpt2 is read"
    if activation not in TANH_GELU:
        yield f"activation_function is {activation}: this GPT has gelu_new (the tanh approximation) only"
    required = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    for key, value in required.items():
        if bool(stored.get(key, value)) is not value:
            yield f"{key} is {stored[key]}: this GPT computes attention with {key}={value} only"
    if stored.get("quantization_config"):
        yield "the weights are quantised: save them as float32 or float16 first"


def read(file: Path, shape: Model) -> Tensors:
    """Return the tensors by our names and in our layout; the word table has ``shape.vocab`` rows.

    Raises:
        UserError: a file is damaged or refused, or has not the parameters of a GPT-2.
    """
    tensors, expected = open_tensors(file), dict(names(shape.layers))
    missing = [theirs for theirs in expected.values() if theirs not in tensors]
    unknown = sorted(set(tensors) - set(expected.values()))
    problems = [
        f"{len(group)} {problem} ({', '.join(group[:3])}...)"
        for problem, group in (("parameters are missing", missing), ("are unknown", unknown))
        if group
    ]
    if problems:
        raise UserError(f"{file}: not a GPT-2 of {shape.layers} layers: {' and '.join(problems)}")
    return {ours: _in_our_layout(ours, tensors[theirs], shape.heads) for ours, theirs in expected.items()}


def _in_our_layout(name: str, tensor: Tensor, heads: int) -> Tensor:
    if ".qkv." not in name or tensor.shape[-1] % (3 * heads):
        return tensor
    return Tensor(tensor.shape, lambda: interleave_qkv(tensor.read(), heads))
