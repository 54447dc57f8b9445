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
    r"(?P<what>self_attn\.(?:qkv|q|k|v|out)_proj|linear[12]|norm[12])\.(?P<part>weight|bias)"
)
LAST = re.compile(r"(?:gpt\.decoder|\d+)\.(?:norm\.)?(weight|bias)")
THREE = ("attention.q", "attention.k", "attention.v")


def renamed(name: str) -> str | None:
    """Our name of a parameter, or None.

    Example:
        >>> renamed("gpt.decoder.layers.3.self_attn.qkv_proj.weight"), renamed("4.linear2.bias")
        ('layers.3.attention.qkv.weight', 'layers.3.fc2.bias')
    """
    if found := TABLE.fullmatch(name):
        return f"{found[1]}.weight"
    if found := INSIDE.fullmatch(name):
        layer = int(found["layer"]) if found["layer"] else int(found["place"]) - 1
        what = found["what"].replace("self_attn", "attention").replace("_proj", "").replace("linear", "fc")
        return f"layers.{layer}.{what}.{found['part']}"
    if found := LAST.fullmatch(name):
        return f"norm.{found[1]}"
    return None


def files(source: Path) -> list[list[Path]] | None:
    """The files that ``source`` names or holds: of every pipeline stage, those of its mp ranks in order.

    Raises:
        UserError: a rank's folder is missing.
    """
    if source.is_file():
        return [[source]] if source.suffix == ".pdparams" else None
    if RANK.fullmatch(source.name):
        source = source.parent
    ranks = {}
    for folder in source.iterdir() if source.is_dir() else ():
        found = RANK.fullmatch(folder.name)
        if found and (folder / FILE).is_file() and int(found[2]) == 0:
            ranks[int(found[3]), int(found[1])] = folder / FILE
    if not ranks:
        return [[source / FILE]] if (source / FILE).is_file() else None
    stages, degree = (1 + max(place[axis] for place in ranks) for axis in (0, 1))
    absent = [(pp, mp) for pp in range(stages) for mp in range(degree) if (pp, mp) not in ranks]
    missing = [f"mp_{mp:02}_sharding_00_pp_{pp:02}/{FILE}" for pp, mp in absent]
    if missing:
        raise UserError(f"{source}: mp {degree} x pp {stages} ranks, but {', '.join(missing[:4])} is not there")
    return [[ranks[pp, mp] for mp in range(degree)] for pp in range(stages)]


def tensors(grid: list[list[Path]]) -> Tensors:
    """Whole tensors by our names; separate projections of queries, keys and values stay separate.

    Raises:
        UserError: a file is damaged or refused, or mp ranks have not the same parameters.
    """
    found: Tensors = {}
    for stage in grid:
        parts = [tensor_files.open_file(path) for path in stage]
        strange = sorted({name for part in parts for name in part if renamed(name) is None})
        if strange:
            raise UserError(f"{stage[0]}: unknown parameters: {', '.join(strange[:5])}")
        if any(set(part) != set(parts[0]) for part in parts):
            raise UserError(f"{stage[0].parent}: its parameters are not those of the other mp ranks")
        for name in parts[0]:
            found.setdefault(str(renamed(name)), _joined(str(renamed(name)), [part[name] for part in parts]))
    return found


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    axis = parameter(re.sub(r"attention\.[qkv]\.", "attention.qkv.", name)).tp_axis
    if len(parts) == 1 or axis is None:
        return parts[0]
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    return Tensor(shape, lambda: np.concatenate([part.read() for part in parts], axis))


def infer_shape(there: Tensors) -> dict[str, int]:
    """What the weights say of the model's shape; the number of heads cannot be seen."""
    word, position, fc1 = (there[name].shape for name in ("word.weight", "position.weight", "layers.0.fc1.weight"))
    layers = 1 + max(int(name.split(".")[1]) for name in there if name.startswith("layers."))
    return {"hidden": word[1], "layers": layers, "ffn": fc1[1], "positions": position[0]}


def problems(there: Tensors, model: Model) -> Iterator[str]:
    """Why the weights are not those of ``model``."""
    try:
        shape = infer_shape(there)
    except (KeyError, ValueError, IndexError):
        yield "there is no GPT in it: the embeddings or the first block are missing"
        return
    differing = {key: value for key, value in shape.items() if getattr(model, key) != value}
    if differing:
        said = ", ".join(f"model.{key}={value} (not {getattr(model, key)})" for key, value in differing.items())
        yield (
            f"the weights have {said}: give the model that they are of, such as model=345m, or these keys and "
            "model.heads, which cannot be seen in weights"
        )
    rows = there["word.weight"].shape[0]
    if rows < model.vocab:
        yield f"the word table has {rows:,} rows, fewer than model.vocab={model.vocab:,}: set model.vocab={rows}"


def read(there: Tensors, model: Model) -> Tensors:
    """The tensors with fused qkv, and ``model.vocab`` rows in the word table: those beyond only pad."""
    found = {name: tensor for name, tensor in there.items() if not re.search(r"attention\.[qkv]\.", name)}
    word = there["word.weight"]
    found["word.weight"] = Tensor([model.vocab, word.shape[1]], lambda: word.read()[: model.vocab])
    for name in [name for name in there if "attention.q." in name]:
        fused = _fused([there[name.replace("attention.q", kind)] for kind in THREE], model.heads)
        found[name.replace("attention.q", "attention.qkv")] = fused
    return found


def _fused(three: list[Tensor], heads: int) -> Tensor:
    shape = [*three[0].shape[:-1], 3 * three[0].shape[-1]]
    return Tensor(shape, lambda: interleave_qkv(np.concatenate([tensor.read() for tensor in three], axis=-1), heads))
