"""``task=import_weights``: write other projects' files as a checkpoint that every task reads. No Paddle here."""

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
    """Weights by our names, the model that they belong to, and the format of their files."""

    tensors: Tensors
    model: Model
    format: Foreign


def check(config: Config) -> list[str]:
    """Return the problems of the command and its files; nothing is written, and of the weights only names are read."""
    settings = config.import_weights
    problems = [
        f"import_weights.{key} has no value: give {meaning} with import_weights.{key}=..."
        for key, meaning in (("source", "the folder with the weights"), ("output", "the folder to make"))
        if not getattr(settings, key)
    ]
    if settings.output and Path(settings.output).exists():
        problems.append(f"import_weights.output={settings.output}: there is something already; it is never overwritten")
    if problems:
        return problems
    try:
        weights, vocabulary = inspect(config), find_tokenizer(config)
        problems += rule_problems(_checkpoint_config(config, weights.model, None))
        if vocabulary and (size := tokenizer.open_encoder(vocabulary).vocab) > weights.model.vocab:
            problems.append(f"{vocabulary} has {size:,} tokens, the weights have {weights.model.vocab:,} only")
    except UserError as error:
        problems.append(str(error))
    return problems


def inspect(config: Config) -> ImportedWeights:
    """Open the weights that ``import_weights.source`` names, and find out the model that they belong to.

    Raises:
        UserError: there are no weights, or they are not those of a supported GPT.
    """
    settings = config.import_weights
    source = Path(str(settings.source))
    if not source.exists():
        raise UserError(f"import_weights.source={source}: not found")
    grid = fleetx.find_files(source) if settings.format is not Foreign.huggingface else None
    if grid:
        tensors = fleetx.open_tensors(grid)
        if problems := list(fleetx.problems(tensors, config.model)):
            raise UserError("; ".join(f"{source}: {problem}" for problem in problems))
        weights = ImportedWeights(fleetx.read(tensors, config.model), config.model, Foreign.fleetx)
    else:
        file = huggingface.find_file(source) if settings.format is not Foreign.fleetx else None
        if file is None:
            looked_for = {Foreign.huggingface: huggingface.FILES, Foreign.fleetx: (fleetx.FILE,)}
            either = (*huggingface.FILES, f"{fleetx.FILE} (of one rank, or in mp_.. folders)")
            names = looked_for.get(settings.format, either)
            raise UserError(f"import_weights.source={source}: no weights there; looked for {', '.join(names)}")
        model = huggingface.read_config(source, config.model)
        weights = ImportedWeights(huggingface.read(file, model), model, Foreign.huggingface)
    m = weights.model
    expected_shapes = parameter_shapes(_checkpoint_config(config, m, None)) | {WORD: [m.vocab, m.hidden]}
    try:
        reshard.require_same({name: tensor.shape for name, tensor in weights.tensors.items()}, expected_shapes)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    return weights


def find_tokenizer(config: Config) -> Path | None:
    """Return the tokenizer of the weights, or None.

    Raises:
        UserError: ``import_weights.tokenizer`` does not name a tokenizer.
    """
    source, named = Path(str(config.import_weights.source)), config.import_weights.tokenizer
    cache = Path(config.data.cache_dir)
    if named:
        return tokenizer_files.find(named, cache)
    folder = source if source.is_dir() else source.parent
    sets = [("tokenizer.json",), *zip(tokenizer_files.VOCABULARIES, tokenizer_files.MERGES, strict=True)]
    complete = any(all((folder / name).is_file() for name in names) for names in sets)
    return tokenizer_files.find(str(folder), cache) if complete else None


def _checkpoint_config(config: Config, model: Model, eot: int | None) -> Config:
    """Return the configuration for the checkpoint: the model of the weights, and no data."""
    data = Data(
        kind=DataKind.tokens, path=None, blend=[], seq_len=model.positions, split=list(config.data.split),
        order=config.data.order, mask_eot=config.data.mask_eot, cache_dir=config.data.cache_dir,
        vocab=model.vocab, extensions=list(config.data.extensions), eot_id=eot,
    )  # fmt: skip
    return dataclasses.replace(one_rank(config), model=model, data=data)


def run(config: Config, say: Callable[[str], None]) -> list[tuple[str, str]]:
    """Write the checkpoint; return a table about it. Call ``check`` first. The weights are held in memory once.

    Raises:
        UserError: a tensor cannot be read, or has values that are not finite.
        OSError: the disk is full or gone; nothing is left.
    """
    weights, vocabulary = inspect(config), find_tokenizer(config)
    encoder = tokenizer.open_encoder(vocabulary) if vocabulary else None
    made = _checkpoint_config(config, weights.model, encoder.eot if encoder else None)
    output = Path(str(config.import_weights.output))
    if vocabulary is None:
        say("no tokenizer lies with the weights: name one with import_weights.tokenizer=... to read and write text")
    pieces = {}
    for name, shape in parameter_shapes(made).items():
        array = weights.tensors[name].read()
        if not np.isfinite(array).all():
            raise UserError(f"{config.import_weights.source}: {name} has values that are not finite")
        if name == WORD:
            array = np.pad(array, ((0, padded_vocab(made) - len(array)), (0, 0)))
        pieces[name] = TensorShard(shape, ShardRange(0, 0, shape[0]), np.ascontiguousarray(array))
    data = DatasetInfo([], "", made.data.eot_id, None, encoder.digest if encoder else None, 0)
    origin = {"format": weights.format.value, "source": str(config.import_weights.source)}
    state = {
        "step": 0, "samples": 0, "tokens": 0, "data_fingerprint": "", "data": data.plain(), "config": plain(made),
        "versions": versions(), "loss_scale": None, "imported": origin,
    }  # fmt: skip
    saver.write_alone(output, saver.CheckpointShard(0, pieces, {}, state, vocabulary))
    m = weights.model
    return [
        ("format", weights.format.value),
        ("model", f"{m.layers} layers x {m.hidden}, {m.heads} heads, {m.positions:,} positions"),
        ("vocabulary", f"{m.vocab:,} tokens" + (f", tokenizer of {encoder.vocab:,}" if encoder else ", no tokenizer")),
        ("parameters", f"{sum(math.prod(piece.shape) for piece in pieces.values()):,}"),
        ("checkpoint", str(output)),
    ]
