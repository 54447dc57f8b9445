"""``task=export``: its check, and the export for Hugging Face's tools."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from gpt.config.parameters import WORD
from gpt.config.schema import Config, Model
from gpt.data import tokenizer
from gpt.runs.checkpoint import shard_files
from gpt.runs.checkpoint.checkpoint import Checkpoint
from gpt.runs.checkpoint.reshard import ShardRange, TensorShard
from gpt.runs.convert import huggingface
from gpt.utils.files import atomic_directory


def check(config: Config) -> list[str]:
    """Return the problems of the command; nothing is written."""
    output = Path(str(config.export.output))
    return [f"export.output={output}: there is something already; it is never overwritten"] if output.exists() else []


def end_of_text(source: Checkpoint) -> int | None:
    """Return the end-of-text token of a checkpoint's tokenizer, or of its data."""
    eot: int | None = source.encoder().eot if source.tokenizer else source.state["data"]["eot_id"]
    return eot


def to_huggingface(source: Checkpoint, model: Model, output: Path) -> list[str]:
    """Write ``config.json``, ``model.safetensors`` in float32 and the tokenizer's files; return their names.

    Raises:
        OSError: the disk is full or gone; nothing is left.
    """
    stored, pieces = source.model(), {}
    for ours, theirs in huggingface.names(model.layers):
        array = stored[ours]
        if ours == WORD:
            array = array[: model.vocab]
        if ".qkv." in ours:
            array = huggingface.deinterleave_qkv(array, model.heads)
        array = np.ascontiguousarray(array)
        pieces[f"transformer.{theirs}"] = TensorShard(list(array.shape), ShardRange(0, 0, array.shape[0]), array)
    with atomic_directory(output) as folder:
        shard_files.write(folder / "model.safetensors", pieces, {"format": "pt"})
        _write(folder / "config.json", _gpt2_config(model, end_of_text(source)))
        if source.tokenizer:
            _write_tokenizer(source.tokenizer, folder, model.positions)
        return sorted(path.name for path in folder.iterdir())


def _gpt2_config(model: Model, eot: int | None) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": model.vocab,
        "n_positions": model.positions,
        "n_ctx": model.positions,
        "n_embd": model.hidden,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_inner": model.ffn,
        "layer_norm_epsilon": model.layer_norm_eps,
        "initializer_range": model.init_std,
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.attention_dropout,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def _write_tokenizer(file: Path, folder: Path, positions: int) -> None:
    """Write ``tokenizer.json``, and the two files of a byte-level BPE; copy a SentencePiece model."""
    shutil.copyfile(file, folder / file.name)
    if file.suffix != ".json":
        return
    whole = json.loads(file.read_text(encoding="utf-8"))
    vocabulary, before = whole["model"].get("vocab"), whole.get("pre_tokenizer") or {}
    byte_level = whole["model"].get("type") == "BPE" and before.get("type") == "ByteLevel"
    end = next((end for end in tokenizer.ENDS if isinstance(vocabulary, dict) and end in vocabulary), None)
    if byte_level:
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in whole["model"]["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        _write(folder / "vocab.json", vocabulary)
    kind = "GPT2Tokenizer" if byte_level else "PreTrainedTokenizerFast"
    settings: dict[str, Any] = {"tokenizer_class": kind, "model_max_length": positions}
    if end:
        settings |= {"eos_token": end, "bos_token": end, "unk_token": end}
    _write(folder / "tokenizer_config.json", settings)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
