"""Weights that are not what they should be: one sentence with the remedy, and nothing is run, made or changed."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from conftest import Ran, configured
from foreign import fleetx_names, gpt2, random_parameters, save_fleetx
from safetensors.numpy import load_file, save_file
from test_weights import FLEETX, command, imported

from gpt.data import tokenizer, tokenizer_files
from gpt.data.corpus import DatasetInfo
from gpt.runs import source as runs_source
from gpt.runs.convert import export_weights, import_weights, tensor_files
from gpt.utils.errors import UserError


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return gpt2(tmp_path / "hf")


def refused(source: Path, tmp_path: Path, *more: str) -> str:
    """The problems of the command, which leaves nothing behind."""
    problems = import_weights.check(command(source, tmp_path / "out", *more))
    assert problems
    assert not (tmp_path / "out").exists()
    return "\n".join(problems)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch /tmp/this-must-never-be-there",))


@pytest.mark.parametrize(
    "payload",
    [
        pickle.dumps({"wte.weight": Evil()}, protocol=2),
        b"\x80\x04\x8c\x0bcollections\x8c\x0cos.path.join\x93)R.",  # a name with dots of a module that is allowed
    ],
)
def test_a_pickle_that_asks_for_more_than_tensors_is_refused_and_not_run(tmp_path: Path, payload: bytes) -> None:
    marker = Path("/tmp/this-must-never-be-there")
    marker.unlink(missing_ok=True)
    (tmp_path / "x.pdparams").write_bytes(payload)
    with pytest.raises(UserError, match=r"refused, nothing of it was run: this pickle asks for .*(system|join)"):
        tensor_files.open_file(tmp_path / "x.pdparams")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"activation_function": "relu"}, "activation_function is relu: this GPT has gelu_new"),
        ({"activation_function": "gelu"}, "activation_function is gelu: this GPT has gelu_new"),
        ({"model_type": "llama"}, "model_type is llama: only gpt2 is read"),
        ({"scale_attn_by_inverse_layer_idx": True}, "computes attention with scale_attn_by_inverse_layer_idx=False"),
        ({"quantization_config": {"bits": 8}}, "the weights are quantised"),
        ({"n_head": 7}, "not divisible by model.heads=7"),
        ({"n_layer": 3}, "not a GPT-2 of 3 layers: 12 parameters are missing (h.2."),
        ({"n_layer": 1}, "are unknown (h.1."),
        ({"n_positions": 50}, "position.weight has shape [40, 60] there and [50, 60] here"),
        ({"vocab_size": 299}, "word.weight has shape [300, 60] there and [299, 60] here"),
        ({"n_embd": None}, "not the config.json of a GPT-2"),
    ],
)
def test_a_configuration_that_this_gpt_does_not_compute(
    hf: Path, tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    path = hf / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert expected in refused(hf, tmp_path)


def test_an_untied_head(tmp_path: Path) -> None:
    gpt2(tmp_path / "hf", "untied")
    assert "tied head only" in refused(tmp_path / "hf", tmp_path)


def test_files_that_are_not_there_or_damaged(hf: Path, tmp_path: Path) -> None:
    assert "not found" in refused(tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "no weights there; looked for model.safetensors" in refused(tmp_path / "empty", tmp_path)
    assert "looked for model.pdparams" in refused(hf, tmp_path, "import_weights.format=fleetx")
    whole = (hf / "model.safetensors").read_bytes()
    (hf / "model.safetensors").write_bytes(whole[:-1000])
    assert "damaged or not a file of weights" in refused(hf, tmp_path)
    (hf / "model.safetensors").write_bytes(b"hello")
    assert "damaged or not a file of weights" in refused(hf, tmp_path)
    (hf / "model.safetensors").unlink()
    (hf / "pytorch_model.bin").write_bytes(b"hello")
    assert "pytorch_model.bin: torch's .bin files are pickles and are not read" in refused(hf, tmp_path)
    index = {"weight_map": {"wte.weight": "model-00001-of-00002.safetensors"}}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names model-00001-of-00002.safetensors, which is not in" in refused(hf, tmp_path)
    (hf / "config.json").unlink()
    assert "config.json: not there; it says the shape" in refused(hf, tmp_path)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    gpt2(tmp_path / "hf")
    file = tmp_path / "hf/model.safetensors"
    state = load_file(file)
    state["transformer.h.0.mlp.c_fc.bias"][3] = np.nan
    save_file(state, file)
    config = command(file, tmp_path / "out")
    with pytest.raises(UserError, match=r"layers\.0\.fc1\.bias has values that are not finite"):
        import_weights.run(config, print)
    assert not (tmp_path / "out").exists()


def test_the_predecessors_files_need_the_model_they_are_of(tmp_path: Path) -> None:
    config = configured(FLEETX)
    save_fleetx(tmp_path / "x", fleetx_names(random_parameters(config)), 4, 2, 2)
    said = refused(tmp_path / "x", tmp_path)
    for words in ("model.hidden=32 (not 128)", "model.positions=16 (not 128)", "model.heads, which cannot be seen"):
        assert words in said
    assert "fewer than model.vocab=4,096: set model.vocab=512" in said
    os.remove(tmp_path / "x/mp_01_sharding_00_pp_00/model.pdparams")
    said = refused(tmp_path / "x", tmp_path, *FLEETX)
    assert "mp 2 x pp 2 ranks, but mp_01_sharding_00_pp_00/model.pdparams is not there" in said
    paddle.save({"gpt.pooler.weight": paddle.ones([2])}, str(tmp_path / "model.pdparams"))
    assert "unknown parameters: gpt.pooler.weight" in refused(tmp_path / "model.pdparams", tmp_path, *FLEETX)


def test_a_tokenizer_with_more_tokens_than_the_weights(hf: Path, tmp_path: Path) -> None:
    tokenizer.train(["some text " * 50 + "".join(map(chr, range(33, 400)))], 400, tmp_path / "tokenizer.json")
    said = refused(hf, tmp_path, f"import_weights.tokenizer={tmp_path / 'tokenizer.json'}")
    assert "tokens, the weights have 300 only" in said
    assert "no such file or folder" in refused(hf, tmp_path, "import_weights.tokenizer=nowhere")


def test_what_is_there_is_never_overwritten(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for problems in (
        import_weights.check(command(hf, tmp_path / "there")),
        export_weights.check(configured(["task=export", f"export.output={tmp_path / 'there'}"])),
    ):
        assert ["there is something already; it is never overwritten" in p for p in problems] == [True]
    with pytest.raises(UserError) as refused:
        configured(["task=export", "parallel=mp2", "data=text", "data.path=x"])
    assert refused.value.problems == [
        "task=export is done by one rank, not 2: leave out parallel=...",
        "export.output has no value: give the folder to make with export.output=...",
    ]


def test_a_run_starts_only_with_weights_of_its_model_and_tokens_of_its_data(hf: Path, tmp_path: Path) -> None:
    imported(hf, tmp_path / "out")
    (problem,) = runs_source.start_problems(configured([f"checkpoint={tmp_path / 'out'}"]))
    assert "model.heads is 5 there and 4 here" in problem
    remedy = problem.split(": add ")[1].split()
    assert runs_source.start_problems(configured([f"checkpoint={tmp_path / 'out'}", *remedy, "data.vocab=300"])) == []
    assert "no such folder" in runs_source.start_problems(configured(["checkpoint=nowhere"]))[0]

    files = [tmp_path / f"{name}.json" for name in "abc"]
    for file, text in zip(files, ("one text " * 9, "one text " * 9, "another text " * 9), strict=True):
        tokenizer.train([text], 270, file)
    files[1].write_text(json.dumps(json.loads(files[1].read_text()), indent=3))  # the same, written otherwise
    assert tokenizer_files.same(files[0], files[1])
    assert not tokenizer_files.same(files[0], files[2])
    tokens = imported(hf, tmp_path / "with", f"import_weights.tokenizer={files[0]}")
    config = configured([f"checkpoint={tokens}"])
    data = DatasetInfo([], "", 0, str(files[1]), None, 0)
    assert runs_source.same_tokenizer(config, data) is None
    with pytest.raises(UserError, match=r"are of another tokenizer: prepare the text with it"):
        runs_source.same_tokenizer(config, DatasetInfo([], "", 0, str(files[2]), None, 0))
    assert "the data has no tokenizer" in str(runs_source.same_tokenizer(config, DatasetInfo([], "", 0, None, None, 0)))


@pytest.mark.slow
def test_the_commands_say_it_and_leave_nothing(gpt: Callable[..., Ran], tmp_path: Path) -> None:
    for arguments, words in (
        (["task=import_weights"], "import_weights.source has no value"),
        (["task=import_weights", "import_weights.source=x", "import_weights.output=y"], "import_weights.source=x: not"),
        (["task=export", "checkpoint=x", "export.output=y"], "checkpoint=x: no such folder"),
        (["checkpoint=x"], "checkpoint=x: no such folder"),
    ):
        ran = gpt(*arguments)
        assert (ran.code, ran.out) == (2, ""), ran.text
        assert words in ran.err
        assert "Traceback" not in ran.err
        assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gpt.runs.checkpoint.shard_files._write_all", full)
    with pytest.raises(OSError, match="No space left"):
        import_weights.run(command(hf, tmp_path / "out"), lambda line: None)
    assert sorted(os.listdir(tmp_path)) == ["hf"]
