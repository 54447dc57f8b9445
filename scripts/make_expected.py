"""Make the files of tests/expected: what torch and transformers compute, for tests that run without them.

    pip install -e '.[cpu,bench]'
    python scripts/make_expected.py

Every value is drawn by numpy or torch from a seed stated here, so a second run with the same versions writes the same
files; the versions are in expected.json. Tests marked ``[torch]`` compare with ``Torch`` itself where it is installed.

- expected.json: of every model of ``MODELS`` the files that ``save_pretrained`` writes, without the parameters, which
  ``draw`` gives again (the header of a safetensors file and the SHA-256 of the whole say whether they are the same);
  greedy continuations by ``generate``; the ids of ``TEXT``; parameters and FLOPs of a token of every model of
  conf/model, by torch's ``FlopCounterMode``.
- logits.safetensors: of ``batch``, by ``GPT2LMHeadModel`` in float32 on the CPU.
- half.safetensors: numbers in float16 and bfloat16 and what torch widens them to.
- tokenizer.json: a byte-level BPE trained on a sentence.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt import cli  # noqa: E402
from gpt.data import tokenizer  # noqa: E402
from gpt.utils.arrays import Array  # noqa: E402
from scripts.bench_plan import COMMON, count_with_torch  # noqa: E402

FOLDER = ROOT / "tests" / "expected"
SHAPE = {"vocab_size": 300, "n_embd": 60, "n_head": 5, "n_layer": 2, "n_positions": 40}
MODELS: dict[str, dict[str, Any]] = {
    "5 heads": {},
    "3 heads": {
        "n_embd": 48, "n_head": 3, "n_layer": 3, "n_inner": 100, "vocab_size": 257, "layer_norm_epsilon": 1e-3,
    },
    "2 heads": {"n_embd": 32, "n_head": 2, "n_positions": 32},
    "shards": {"max_shard_size": "200KB"},
    "untied": {"tie_word_embeddings": False},
}  # fmt: skip
COMPUTED = list(MODELS)[:3]  # whose logits and greedy tokens are compared
TRAINED_ON = "the cat sat on the mat and the dog saw the cat " * 5
TEXT = "the dog sat on the cat, été 1999"


def draw(shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    """Return parameters by name from seed 0: uniform with a deviation of 0.1, around 1 for weights of a LayerNorm.

    No function of a mathematical library is called, so they are the same bits on every machine.
    """
    rng, half = np.random.default_rng(0), np.float32(0.1 * 3**0.5)
    drawn = {}
    for name in sorted(shapes):
        centre = np.float32(".ln_" in name and name.endswith(".weight"))
        drawn[name] = (2 * rng.random(shapes[name], dtype=np.float32) - 1) * half + centre
    return drawn


def batch(name: str) -> Array:
    """Return the tokens [2, T] that a model of ``MODELS`` is compared on."""
    shape = {**SHAPE, **MODELS[name]}
    tokens_BT: Array = np.random.default_rng(1).integers(0, 300, [2, 33]) % shape["vocab_size"]
    return tokens_BT[:, : shape["n_positions"]]


@functools.cache
def _torch_model(name: str) -> Any:
    """Return transformers' GPT-2 of a shape of ``MODELS`` with the parameters of ``draw``."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    changes = {key: value for key, value in MODELS[name].items() if key != "max_shard_size"}
    config = transformers.GPT2Config(**{**SHAPE, "bos_token_id": 0, "eos_token_id": 0, **changes})
    model = transformers.GPT2LMHeadModel(config).eval()
    parameters = dict(model.named_parameters())
    drawn = draw({key: tuple(parameter.shape) for key, parameter in parameters.items()})
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(drawn[key]))
    return model


class Torch:
    """The real thing: torch and transformers, as they are installed."""

    def save(self, name: str, folder: Path) -> Path:
        """Write the folder of a model by ``save_pretrained`` and return it."""
        limit = {key: value for key, value in MODELS[name].items() if key == "max_shard_size"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _torch_model(name).save_pretrained(folder, **limit)
        return folder

    def logits(self, name: str, folder: Path | None = None) -> Array:
        """Return logits [B, T, vocab] of ``batch``, by the model or by the one that ``folder`` holds."""
        import torch
        import transformers

        model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval() if folder else _torch_model(name)
        with torch.no_grad():
            logits_BTV: Array = model(torch.from_numpy(batch(name))).logits.numpy()
        return logits_BTV

    def greedy(self, name: str, prompt: list[int], count: int) -> list[int]:
        """Return ``prompt`` and the ``count`` tokens by which ``generate`` continues it."""
        import torch

        end = {"eos_token_id": None, "pad_token_id": 0}
        rows = _torch_model(name).generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, **end)
        tokens: list[int] = rows[0].tolist()
        return tokens

    def half(self, folder: Path) -> Path:
        """Write tensors [3, 5] "float16" and "bfloat16", and each "widened" to float32; return the file."""
        import torch
        from safetensors.torch import save_file as save_tensors

        values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
        tensors = {name: values.to(getattr(torch, name)) for name in ("float16", "bfloat16")}
        tensors |= {f"{name} widened": tensor.float() for name, tensor in tensors.items()}
        save_tensors(tensors, folder / "half.safetensors")
        return folder / "half.safetensors"

    def ids(self, folder: Path) -> list[int]:
        """Return the ids of ``TEXT`` by the tokenizer of a model's folder."""
        import transformers

        ids: list[int] = transformers.AutoTokenizer.from_pretrained(folder).encode(TEXT)
        return ids

    def count(self, model: str) -> list[float]:
        """Return the parameters of a model of conf/model, and the FLOPs of a training token."""
        return list(count_with_torch(cli.compose_job([f"model={model}", *COMMON])))


def described(folder: Path) -> dict[str, Any]:
    """Return the text of every JSON file of a model's folder, and header and SHA-256 of every safetensors file."""
    files: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        header = content[8 : 8 + int.from_bytes(content[:8], "little")].decode()
        weights = {"header": header, "sha256": hashlib.sha256(content).hexdigest()}
        files[path.name] = weights if path.suffix == ".safetensors" else content.decode()
    return files


def main() -> None:
    """Write the four files."""
    reference = Torch()
    FOLDER.mkdir(exist_ok=True)
    tokenizer.train([TRAINED_ON], 290, FOLDER / "tokenizer.json")
    reference.half(FOLDER)
    save_file({name: reference.logits(name) for name in COMPUTED}, FOLDER / "logits.safetensors")
    packages = ("torch", "transformers", "safetensors", "tokenizers", "numpy")
    expected: dict[str, Any] = {"made_with": {name: version(name) for name in packages}, "folders": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            expected["folders"][name] = described(reference.save(name, Path(folder) / name))
        first = Path(folder) / COMPUTED[0]
        (first / "tokenizer.json").write_bytes((FOLDER / "tokenizer.json").read_bytes())
        expected["ids"] = reference.ids(first)
    dog = tokenizer.open_encoder(FOLDER / "tokenizer.json").encode("the dog").tolist()
    expected["greedy"] = {name: [reference.greedy(name, batch(name)[0, :5].tolist(), 20)] for name in COMPUTED}
    expected["greedy"]["2 heads"].append(reference.greedy("2 heads", dog, 9))
    models = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml"))
    expected["counts"] = {model: reference.count(model) for model in models}
    (FOLDER / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
