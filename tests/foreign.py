"""Folders with weights as other projects leave them, made here: there is no network in a test."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from gpt.config.derived import replace_in, typed
from gpt.config.parameters import parameter_shapes
from gpt.config.schema import Config, Model
from gpt.model.gpt import GPT
from gpt.parallel.topology import Topology
from gpt.runs.checkpoint import checkpoint
from gpt.train.trainer import Trainer
from gpt.utils.arrays import Array

SHAPE = {"vocab_size": 300, "n_embd": 60, "n_head": 5, "n_layer": 2, "n_positions": 40}


def gpt2(folder: Path, **changes: Any) -> Any:
    """A GPT-2 of transformers with random weights, biases and norms too, saved to ``folder``; returns it."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    shards = {"max_shard_size": changes.pop("max_shard_size")} if "max_shard_size" in changes else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**SHAPE, **ends, **changes})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder, **shards)
    return model


def torch_logits(model: Any, tokens_BT: Array) -> Array:
    """Those of transformers."""
    import torch

    with torch.no_grad():
        logits: Array = model(torch.from_numpy(tokens_BT)).logits.numpy()
    return logits


def shape(found: checkpoint.Checkpoint) -> Model:
    """Of the model that a checkpoint is of."""
    return typed(found.state["config"]).model


def loaded(folder: Path) -> GPT:
    """The model of a checkpoint folder, as task=generate has it."""
    found = checkpoint.load_or_fail(folder, print)
    config = typed(found.state["config"])
    config = replace_in(config, {"cluster.device": "cpu"})
    engine = Trainer(config, Topology(config.parallel, "cpu"), train=False)  # type: ignore[arg-type]
    engine.load(found.model(), None, {})
    engine.model.eval()
    model: GPT = engine.model
    return model


def logits(model: GPT, tokens_BT: Array) -> Array:
    """Ours, of real tokens."""
    with paddle.no_grad():
        out: Array = model(paddle.to_tensor(tokens_BT)).numpy()
    return out[..., : model.config.model.vocab]


def greedy(some_logits: Any, prompt: list[int], count: int) -> list[int]:
    """The tokens that follow, each the most likely one."""
    row = list(prompt)
    for _ in range(count):
        row.append(int(some_logits(np.array([row]))[0, -1].argmax()))
    return row


def random_parameters(config: Config, seed: int = 0) -> dict[str, Array]:
    """Of the model, by our names."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in parameter_shapes(config).items()}


def fleetx_names(ours: dict[str, Array]) -> dict[str, Array]:
    """By the predecessor's names."""
    fixed = {
        "word.weight": "gpt.embeddings.word_embeddings.weight",
        "position.weight": "gpt.embeddings.position_embeddings.weight",
        "norm.weight": "gpt.decoder.norm.weight",
        "norm.bias": "gpt.decoder.norm.bias",
    }
    changes = (("attention.", "self_attn."), ("qkv.", "qkv_proj."), ("out.", "out_proj."), (".fc", ".linear"))
    found = {}
    for name, array in ours.items():
        theirs = f"gpt.decoder.{name}"
        for a, b in changes:
            theirs = theirs.replace(a, b)
        found[fixed.get(name, theirs)] = array
    return found


def fleetx_rank(state: dict[str, Array], layers: int, mp: tuple[int, int], pp: tuple[int, int]) -> dict[str, Array]:
    """What one rank saves: ``mp`` and ``pp`` are its number and how many there are."""
    part = {}
    for name, array in state.items():
        columns = "qkv_proj" in name or "linear1" in name
        rows = name.endswith(("word_embeddings.weight", "out_proj.weight", "linear2.weight"))
        split = columns or rows
        part[name] = np.split(array, mp[1], axis=-1 if columns else 0)[mp[0]] if split else array
    if pp[1] == 1:
        return part
    each, stage = layers // pp[1], {}
    for name, array in part.items():
        if ".embeddings." in name and pp[0] in (0, pp[1] - 1):
            first = pp[0] == 0 or "word" in name
            stage[name.replace("gpt.embeddings", "shared_layers.embed")] = array if first else array + 1
        if ".layers." in name:
            number, rest = name.removeprefix("gpt.decoder.layers.").split(".", 1)
            if int(number) // each == pp[0]:
                stage[f"{int(number) + 1}.{rest}"] = array
        if ".decoder.norm." in name and pp[0] == pp[1] - 1:
            stage[name.replace("gpt.decoder", f"{layers + 1}")] = array
    return stage


def save_fleetx(folder: Path, state: dict[str, Array], layers: int, mp: int, pp: int) -> None:
    """Per-rank folders as the predecessor writes them, also of a second sharding rank."""
    for m in range(mp):
        for p in range(pp):
            for s in range(2):
                rank = folder / f"mp_{m:02}_sharding_{s:02}_pp_{p:02}"
                rank.mkdir(parents=True)
                part = fleetx_rank(state, layers, (m, mp), (p, pp))
                paddle.save({k: paddle.to_tensor(v) for k, v in part.items()}, str(rank / "model.pdparams"))
                paddle.save({"epoch": 0, "step": 3}, str(rank / "meta_state.pdopt"))
