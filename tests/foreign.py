"""Folders with weights as other projects leave them, made here: there is no network in a test."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from safetensors.numpy import load_file

from gpt.config.derived import replace_in, typed
from gpt.config.parameters import parameter_shapes
from gpt.config.schema import Config, Model
from gpt.model.gpt import GPT
from gpt.parallel.topology import Topology
from gpt.runs.checkpoint import checkpoint
from gpt.train.trainer import Trainer
from gpt.utils.arrays import Array
from scripts import make_expected

VALUES = json.loads((make_expected.FOLDER / "expected.json").read_text(encoding="utf-8"))
TOKENIZER = make_expected.FOLDER / "tokenizer.json"


class Stored:
    """What ``make_expected.Torch`` returned when scripts/make_expected.py was run, under the same names."""

    def save(self, name: str, folder: Path) -> Path:
        files = VALUES["folders"][name]
        headers = {file: json.loads(value["header"]) for file, value in files.items() if isinstance(value, dict)}
        for header in headers.values():
            del header["__metadata__"]
        drawn = make_expected.draw({key: tuple(t["shape"]) for header in headers.values() for key, t in header.items()})
        folder.mkdir(parents=True)
        for file, value in files.items():
            if file not in headers:
                (folder / file).write_text(value, encoding="utf-8")
                continue
            header, raw = headers[file], value["header"].encode()
            order = sorted(header, key=lambda key: header[key]["data_offsets"])
            whole = b"".join([len(raw).to_bytes(8, "little"), raw, *(drawn[key].tobytes() for key in order)])
            assert hashlib.sha256(whole).hexdigest() == value["sha256"], f"{file} is not what transformers wrote"
            (folder / file).write_bytes(whole)
        return folder

    def logits(self, name: str) -> Array:
        logits_BTV: Array = load_file(make_expected.FOLDER / "logits.safetensors")[name]
        return logits_BTV

    def greedy(self, name: str, prompt: list[int], count: int) -> list[int]:
        (row,) = (row for row in VALUES["greedy"][name] if row[: len(prompt)] == prompt)
        assert len(row) == len(prompt) + count
        return list(row)

    def half(self, folder: Path) -> Path:
        return Path(shutil.copy(make_expected.FOLDER / "half.safetensors", folder))

    def ids(self, folder: Path) -> list[int]:
        assert (folder / "tokenizer.json").read_bytes() == TOKENIZER.read_bytes()
        return list(VALUES["ids"])

    def count(self, model: str) -> list[float]:
        return list(VALUES["counts"][model])


def gpt2(folder: Path, name: str = "5 heads") -> Path:
    """The folder of a GPT-2 with random weights, biases and norms too, as ``save_pretrained`` wrote it."""
    return Stored().save(name, folder)


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
