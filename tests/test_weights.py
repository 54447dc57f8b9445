"""Weights from elsewhere compute here what they compute there, and come back bit for bit."""

from __future__ import annotations

import functools
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from conftest import configured
from foreign import (
    TOKENIZER,
    fleetx_names,
    gpt2,
    greedy,
    loaded,
    logits,
    random_parameters,
    save_fleetx,
)
from foreign import (
    shape as shape_of,
)
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gpt.config.derived import replace_in
from gpt.config.schema import Config
from gpt.data import tokenizer
from gpt.runs.checkpoint import checkpoint
from gpt.runs.convert import export_weights, huggingface, import_weights, tensor_files
from scripts.make_expected import COMPUTED, TEXT, Torch, batch

WEIGHTS = "model.safetensors"
FLEETX = ["model=tiny", "model.vocab=512", "model.hidden=32", "model.heads=4", "model.layers=4", "model.positions=16"]


@functools.cache
def composed(*overrides: str) -> Config:
    return configured(["task=import_weights", *overrides])


def command(source: Path, output: Path, *more: str) -> Config:
    values = {"import_weights.source": str(source), "import_weights.output": str(output)}
    return replace_in(composed(*more), values)


def imported(source: Path, output: Path, *more: str) -> Path:
    config = command(source, output, *more)
    assert import_weights.check(config) == []
    import_weights.run(config, lambda line: None)
    return output


@pytest.mark.parametrize("name", COMPUTED)
def test_logits_and_greedy_text_are_those_of_transformers(tmp_path: Path, reference: Any, name: str) -> None:
    ours = loaded(imported(reference.save(name, tmp_path / "hf"), tmp_path / "out"))
    tokens = batch(name)
    np.testing.assert_allclose(logits(ours, tokens), reference.logits(name), atol=1e-4)
    prompt = tokens[0, :5].tolist()
    assert greedy(lambda row: logits(ours, row), prompt, 20) == reference.greedy(name, prompt, 20)


def test_every_kind_of_file_gives_the_same_weights(tmp_path: Path, reference: Any) -> None:
    reference.save("5 heads", tmp_path / "hf")
    reference.save("shards", tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    state = load_file(tmp_path / "hf/model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in state.items()}
    bare["h.0.attn.bias"] = np.tril(np.ones([1, 1, 40, 40], bool))  # a buffer of older files
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text((tmp_path / "hf/config.json").read_text())
    save_file(bare, tmp_path / "bare/model.safetensors")
    wanted = checkpoint.Checkpoint(imported(tmp_path / "hf", tmp_path / "out")).model()
    for name in ("shards", "bare"):
        there = checkpoint.Checkpoint(imported(tmp_path / name, tmp_path / f"out {name}")).model()
        assert there.shapes == wanted.shapes
        assert all(np.array_equal(there[key], wanted[key]) for key in wanted), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_are_widened_exactly(tmp_path: Path, reference: Any, dtype: str) -> None:
    file = reference.half(tmp_path)
    with safe_open(file, "np") as tensors:
        value = tensors.get_tensor(f"{dtype} widened")
    paddle.save({dtype: paddle.to_tensor(value).astype(dtype)}, str(tmp_path / "a.pdparams"))
    for path in (file, tmp_path / "a.pdparams"):
        there = tensor_files.open_file(path)[dtype].read()
        assert there.dtype == np.float32
        np.testing.assert_array_equal(there, value)


def test_pickles_of_older_numpy_and_python_are_read(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.asfortranarray(np.eye(2, 3, dtype=np.float64))}
    old = pickle.dumps(arrays, protocol=2).replace(b"numpy._core.", b"numpy.core.")
    assert b"numpy.core.multiarray" in old
    assert b"_codecs" in old
    (tmp_path / "a.pdparams").write_bytes(old)
    there = tensor_files.open_file(tmp_path / "a.pdparams")
    assert all(np.array_equal(there[name].read(), arrays[name]) for name in arrays)


def test_export_of_an_import_is_bit_equal_and_transformers_loads_it(tmp_path: Path, reference: Any) -> None:
    reference.save("5 heads", tmp_path / "hf")
    found = checkpoint.Checkpoint(imported(tmp_path / "hf", tmp_path / "out"))
    export_weights.to_huggingface(found, shape_of(found), tmp_path / "back")
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("hf", "back"))
    assert set(before) == set(after)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "back"))
    wanted = {"n_inner": 240, "bos_token_id": None, "eos_token_id": None}  # stated; there is no tokenizer
    assert after.items() >= ({key: before[key] for key in after if key in before} | wanted).items()
    if isinstance(reference, Torch):
        np.testing.assert_array_equal(reference.logits("5 heads", tmp_path / "back"), reference.logits("5 heads"))


def test_import_of_an_export_is_bit_equal_and_keeps_shape_and_tokenizer(tmp_path: Path, reference: Any) -> None:
    reference.save("5 heads", tmp_path / "hf")
    shutil.copy(TOKENIZER, tmp_path / "hf")
    first = checkpoint.Checkpoint(imported(tmp_path / "hf", tmp_path / "one"))
    export_weights.to_huggingface(first, shape_of(first), tmp_path / "exported")
    second = checkpoint.Checkpoint(imported(tmp_path / "exported", tmp_path / "two"))
    assert all(np.array_equal(first.model()[name], second.model()[name]) for name in first.model())
    shapes = [{**c.state["config"]["model"], "name": ""} for c in (first, second)]
    assert shapes[0] == shapes[1]
    assert first.tokenizer
    assert second.tokenizer
    assert first.tokenizer.read_bytes() == second.tokenizer.read_bytes()
    ids = tokenizer.open_encoder(second.tokenizer).encode(TEXT).tolist()
    assert reference.ids(tmp_path / "exported") == ids
    (tmp_path / "exported/tokenizer.json").unlink()  # vocab.json and merges.txt are enough
    third = checkpoint.Checkpoint(imported(tmp_path / "exported", tmp_path / "three"))
    assert third.tokenizer
    assert tokenizer.open_encoder(third.tokenizer).encode(TEXT).tolist() == ids


@pytest.mark.parametrize(("mp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_the_predecessors_ranks_are_put_together(tmp_path: Path, mp: int, pp: int) -> None:
    config = configured(FLEETX)
    ours = random_parameters(config)
    save_fleetx(tmp_path / "step_3", fleetx_names(ours), config.model.layers, mp, pp)
    found = checkpoint.Checkpoint(imported(tmp_path / "step_3", tmp_path / "out", *FLEETX))
    assert found.state["imported"]["format"] == "fleetx"
    there = found.model()
    assert set(there) == set(ours)
    assert [name for name in ours if not np.array_equal(there[name], ours[name])] == []
    # The folder of a rank stands for all of them.
    imported(tmp_path / "step_3" / "mp_00_sharding_00_pp_00", tmp_path / "again", *FLEETX)


def test_the_predecessors_separate_projections_are_fused_by_head(tmp_path: Path) -> None:
    config = configured(FLEETX)
    ours = random_parameters(config)
    split = {}
    for name, array in fleetx_names(ours).items():
        if "qkv_proj" in name:
            by_kind = huggingface.deinterleave_qkv(array, config.model.heads)
            split |= {name.replace("qkv", c): part for c, part in zip("qkv", np.split(by_kind, 3, -1), strict=True)}
        else:
            split[name] = array
    paddle.save({k: paddle.to_tensor(v) for k, v in split.items()}, str(tmp_path / "model.pdparams"))
    there = checkpoint.Checkpoint(imported(tmp_path / "model.pdparams", tmp_path / "out", *FLEETX)).model()
    assert [name for name in ours if not np.array_equal(there[name], ours[name])] == []


def test_rows_that_only_pad_for_more_ranks_are_left_out(tmp_path: Path) -> None:
    config = configured(FLEETX)
    ours = random_parameters(config)
    longer = {**ours, "word.weight": np.pad(ours["word.weight"], ((0, 128), (0, 0)), constant_values=7)}
    save_fleetx(tmp_path / "x", fleetx_names(longer), config.model.layers, 2, 1)
    there = checkpoint.Checkpoint(imported(tmp_path / "x", tmp_path / "out", *FLEETX)).model()
    np.testing.assert_array_equal(there["word.weight"], ours["word.weight"])


def test_a_checkpoint_says_where_it_comes_from_and_is_sound(tmp_path: Path) -> None:
    gpt2(tmp_path / "hf")
    out = imported(tmp_path / "hf", tmp_path / "out")
    assert checkpoint.verify(out) is None
    state = json.loads((out / "state.json").read_text())
    assert (state["step"], state["imported"]["format"]) == (0, "huggingface")
    assert state["config"]["model"]["name"] == "hf"
