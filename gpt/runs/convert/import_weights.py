"""``task=import_weights``: other projects' files to a checkpoint folder that every task reads. No Paddle here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt.config.derived import one_rank, padded_vocab, plain
from gpt.config.parameters import WORD, parameter_shapes
from gpt.config.rules import rule_problems
from gpt.config.schema import Config, Data, DataKind, Model
from gpt.config.task_schemas import Foreign
from gpt.data import tokenizer, tokenizer_files
from gpt.data.corpus import DatasetInfo
from gpt.runs.checkpoint import reshard, saver
from gpt.runs.checkpoint.reshard import ShardRange, TensorShard
from gpt.runs.convert import fleetx, huggingface
from gpt.runs.convert.tensor_files import Tensors
from gpt.utils.errors import UserError
from gpt.utils.machine import versions


@dataclass(frozen=True)
class ImportedWeights:
    """Weights that are understood, by our names, and what they are weights of."""

    tensors: Tensors
    model: Model
    format: Foreign


def check(config: Config) -> list[str]:
    """What is wrong with the command or its files; nothing is written, and no weights are read but their names."""
    asked = config.import_weights
    problems = [
        f"import_weights.{key} has no value: give {what} with import_weights.{key}=..."
        for key, what in (("source", "the folder with the weights"), ("output", "the folder to make"))
        if not getattr(asked, key)
    ]
    if asked.output and Path(asked.output).exists():
        problems.append(f"import_weights.output={asked.output}: there is something already; it is never overwritten")
    if problems:
        return problems
    try:
        found = inspect(config)
        vocabulary = find_tokenizer(config)
        problems += rule_problems(_config(config, found, None))
        if vocabulary and (size := tokenizer.open_encoder(vocabulary).vocab) > found.model.vocab:
            problems.append(f"{vocabulary} has {size:,} tokens, the weights have {found.model.vocab:,} only")
    except UserError as error:
        problems.append(str(error))
    return problems


def inspect(config: Config) -> ImportedWeights:
    """Find and understand what ``import_weights.source`` names.

    Raises:
        UserError: there are no weights, or they are not those of a GPT that is known here.
    """
    asked = config.import_weights
    source = Path(str(asked.source))
    if not source.exists():
        raise UserError(f"import_weights.source={source}: not found")
    grid = fleetx.files(source) if asked.format is not Foreign.huggingface else None
    if grid:
        there = fleetx.tensors(grid)
        if problems := list(fleetx.problems(there, config.model)):
            raise UserError("; ".join(f"{source}: {problem}" for problem in problems))
        found = ImportedWeights(fleetx.read(there, config.model), config.model, Foreign.fleetx)
    else:
        file = huggingface.files(source) if asked.format is not Foreign.fleetx else None
        if file is None:
            wanted = {Foreign.huggingface: huggingface.FILES, Foreign.fleetx: (fleetx.FILE,)}
            names = wanted.get(asked.format, (*huggingface.FILES, f"{fleetx.FILE} (of one rank, or in mp_.. folders)"))
            raise UserError(f"import_weights.source={source}: no weights there; looked for {', '.join(names)}")
        model = huggingface.model(source, config.model)
        found = ImportedWeights(huggingface.read(file, model), model, Foreign.huggingface)
    _require_shapes(found, source, config)
    return found


def _require_shapes(found: ImportedWeights, source: Path, config: Config) -> None:
    wanted = parameter_shapes(_config(config, found, None)) | {WORD: [found.model.vocab, found.model.hidden]}
    shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
    try:
        reshard.require_same(shapes, wanted)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def find_tokenizer(config: Config) -> Path | None:
    """The tokenizer that goes with the weights, if there is one.

    Raises:
        UserError: the one that ``import_weights.tokenizer`` names is none.
    """
    asked, source = config.import_weights, Path(str(config.import_weights.source))
    cache = Path(config.data.cache_dir)
    if asked.tokenizer:
        return tokenizer_files.find(asked.tokenizer, cache)
    folder = source if source.is_dir() else source.parent
    sets = [("tokenizer.json",), *zip(tokenizer_files.VOCABULARIES, tokenizer_files.MERGES, strict=True)]
    there = any(all((folder / name).is_file() for name in names) for names in sets)
    return tokenizer_files.find(str(folder), cache) if there else None


def _config(config: Config, found: ImportedWeights, eot: int | None) -> Config:
    """Of the checkpoint: the model of the weights, and no data."""
    data = Data(
        kind=DataKind.tokens, path=None, blend=[], seq_len=found.model.positions, split=list(config.data.split),
        order=config.data.order, mask_eot=config.data.mask_eot, cache_dir=config.data.cache_dir,
        vocab=found.model.vocab, extensions=list(config.data.extensions), eot_id=eot,
    )  # fmt: skip
    return dataclasses.replace(one_rank(config), model=found.model, data=data)


def run(config: Config, say: Callable[[str], None]) -> list[tuple[str, str]]:
    """Write the checkpoint; returns what to show of it. Call ``check`` first. The weights are held in memory once.

    Raises:
        UserError: the weights are not what their names promised.
        OSError: the disk is full or gone; nothing is left.
    """
    found, vocabulary = inspect(config), find_tokenizer(config)
    encoder = tokenizer.open_encoder(vocabulary) if vocabulary else None
    made = _config(config, found, encoder.eot if encoder else None)
    output = Path(str(config.import_weights.output))
    if vocabulary is None:
        say("no tokenizer lies with the weights: name one with import_weights.tokenizer=... to read and write text")
    pieces = {}
    for name, shape in parameter_shapes(made).items():
        array = found.tensors[name].read()
        if not np.isfinite(array).all():
            raise UserError(f"{config.import_weights.source}: {name} has values that are not finite")
        if name == WORD:
            array = np.pad(array, ((0, padded_vocab(made) - len(array)), (0, 0)))
        pieces[name] = TensorShard(shape, ShardRange(0, 0, shape[0]), np.ascontiguousarray(array))
    data = DatasetInfo([], "", made.data.eot_id, None, encoder.digest if encoder else None, 0)
    origin = {"format": found.format.value, "source": str(config.import_weights.source)}
    state = {
        "step": 0, "samples": 0, "tokens": 0, "data_fingerprint": "", "data": data.plain(), "config": plain(made),
        "versions": versions(), "loss_scale": None, "imported": origin,
    }  # fmt: skip
    saver.write_alone(output, saver.CheckpointShard(0, pieces, {}, state, vocabulary))
    m = found.model
    return [
        ("format", found.format.value),
        ("model", f"{m.layers} layers x {m.hidden}, {m.heads} heads, {m.positions:,} positions"),
        ("vocabulary", f"{m.vocab:,} tokens" + (f", tokenizer of {encoder.vocab:,}" if encoder else ", no tokenizer")),
        ("parameters", f"{sum(math.prod(piece.shape) for piece in pieces.values()):,}"),
        ("checkpoint", str(output)),
    ]
