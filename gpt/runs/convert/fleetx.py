"""GPT as the predecessor, PaddleFleetX, stores it: ``model.pdparams``, alone or one per rank, under its own names.

    output/step_N/mp_00_sharding_00_pp_00/model.pdparams

A rank of tensor parallelism (mp) has its rows of the word table and of the projections back into the residual stream,
and its columns of the fused qkv and of the first feed-forward layer. Its qkv is by head, as ours is. A stage of the
pipeline (pp) names layers by their place in a flat list: the embeddings are 0, the blocks 1 to L, the last norm L + 1;
its first and last stages both have the embeddings, of which the first are those in use. Sharding ranks repeat weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpt.config.parameters import parameter
from gpt.config.schema import Model
from gpt.runs.convert import tensor_files
from gpt.runs.convert.huggingface import interleave_qkv
from gpt.runs.convert.tensor_files import Tensor, Tensors
from gpt.utils.errors import UserError

FILE = "model.pdparams"
RANK = re.compile(r"mp_(\d+)_sharding_(\d+)_pp_(\d+)")
TABLE = re.compile(r"(?:gpt\.embeddings|shared_layers\.embed)\.(word|position)_embeddings\.weight")
INSIDE = re.compile(
    r"(?:gpt\.decoder\.layers\.(?P<layer>\d+)|(?P<place>\d+))\."
    r"(?P<kind>self_attn\.(?:qkv|q|k|v|out)_proj|linear[12]|norm[12])\.(?P<part>weight|bias)"
)
LAST = re.compile(r"(?:gpt\.decoder|\d+)\.(?:norm\.)?(weight|bias)")
THREE = ("attention.q", "attention.k", "attention.v")


def our_name(name: str) -> str | None:
    """Return our name of a parameter, or None.

    Example:
        >>> our_name("gpt.decoder.layers.3.self_attn.qkv_proj.weight"), our_name("4.linear2.bias")
        ('layers.3.attention.qkv.weight', 'layers.3.fc2.bias')
    """
    if match := TABLE.fullmatch(name):
        return f"{match[1]}.weight"
    if match := INSIDE.fullmatch(name):
        layer = int(match["layer"]) if match["layer"] else int(match["place"]) - 1
        kind = match["kind"].replace("self_attn", "attention").replace("_proj", "").replace("linear", "fc")
        return f"layers.{layer}.{kind}.{match['part']}"
    if match := LAST.fullmatch(name):
        return f"norm.{match[1]}"
    return None


def find_files(source: Path) -> list[list[Path]] | None:
    """Return the files that ``source`` names or holds: for every pipeline stage those of its mp ranks in order.

    Raises:
        UserError: a rank's folder is missing.
    """
    if source.is_file():
        return [[source]] if source.suffix == ".pdparams" else None
    if RANK.fullmatch(source.name):
        source = source.parent
    ranks = {}
    for folder in source.iterdir() if source.is_dir() else ():
        match = RANK.fullmatch(folder.name)
        if match and (folder / FILE).is_file() and int(match[2]) == 0:
            ranks[int(match[3]), int(match[1])] = folder / FILE
    if not ranks:
        return [[source / FILE]] if (source / FILE).is_file() else None
    stages, degree = (1 + max(place[axis] for place in ranks) for axis in (0, 1))
    absent = [(pp, mp) for pp in range(stages) for mp in range(degree) if (pp, mp) not in ranks]
    missing = [f"mp_{mp:02}_sharding_00_pp_{pp:02}/{FILE}" for pp, mp in absent]
    if missing:
        raise UserError(f"{source}: mp {degree} x pp {stages} ranks, but {', '.join(missing[:4])} is not there")
    return [[ranks[pp, mp] for mp in range(degree)] for pp in range(stages)]


def open_tensors(grid: list[list[Path]]) -> Tensors:
    """Return whole tensors by our names; separate projections of queries, keys and values stay separate.

    Raises:
        UserError: a file is damaged or refused, or mp ranks have not the same parameters.
    """
    tensors: Tensors = {}
    for stage in grid:
        parts = [tensor_files.open_file(path) for path in stage]
        unknown = sorted({name for part in parts for name in part if our_name(name) is None})
        if unknown:
            raise UserError(f"{stage[0]}: unknown parameters: {', '.join(unknown[:5])}")
        if any(set(part) != set(parts[0]) for part in parts):
            raise UserError(f"{stage[0].parent}: its parameters are not those of the other mp ranks")
        for name in parts[0]:
            tensors.setdefault(str(our_name(name)), _joined(str(our_name(name)), [part[name] for part in parts]))
    return tensors


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    axis = parameter(re.sub(r"attention\.[qkv]\.", "attention.qkv.", name)).tp_axis
    if len(parts) == 1 or axis is None:
        return parts[0]
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    return Tensor(shape, lambda: np.concatenate([part.read() for part in parts], axis))


def infer_shape(tensors: Tensors) -> dict[str, int]:
    """Return what the shapes of the tensors tell about the model; they do not tell the number of heads."""
    word, position, fc1 = (tensors[name].shape for name in ("word.weight", "position.weight", "layers.0.fc1.weight"))
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers."))
    return {"hidden": word[1], "layers": layers, "ffn": fc1[1], "positions": position[0]}


def problems(tensors: Tensors, model: Model) -> Iterator[str]:
    """Yield the reasons why the weights are not those of ``model``."""
    try:
        shape = infer_shape(tensors)
    except (KeyError, ValueError, IndexError):
        yield "there is no GPT in it: the embeddings or the first block are missing"
        return
    differing = {key: value for key, value in shape.items() if getattr(model, key) != value}
    if differing:
        shapes = ", ".join(f"model.{key}={value} (not {getattr(model, key)})" for key, value in differing.items())
        yield (
            f"the weights have {shapes}: give the model that they are of, such as model=345m, or these keys and "
            "model.heads, which cannot be seen in weights"
        )
    rows = tensors["word.weight"].shape[0]
    if rows < model.vocab:
        yield f"the word table has {rows:,} rows, fewer than model.vocab={model.vocab:,}: set model.vocab={rows}"


def read(tensors: Tensors, model: Model) -> Tensors:
    """Return the tensors with fused qkv, and without the rows that pad the word table."""
    fused = {name: tensor for name, tensor in tensors.items() if not re.search(r"attention\.[qkv]\.", name)}
    word = tensors["word.weight"]
    fused["word.weight"] = Tensor([model.vocab, word.shape[1]], lambda: word.read()[: model.vocab])
    for name in [name for name in tensors if "attention.q." in name]:
        three = [tensors[name.replace("attention.q", kind)] for kind in THREE]
        fused[name.replace("attention.q", "attention.qkv")] = _fused(three, model.heads)
    return fused


def _fused(three: list[Tensor], heads: int) -> Tensor:
    shape = [*three[0].shape[:-1], 3 * three[0].shape[-1]]
    return Tensor(shape, lambda: interleave_qkv(np.concatenate([tensor.read() for tensor in three], axis=-1), heads))
