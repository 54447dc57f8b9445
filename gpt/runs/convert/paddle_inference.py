"""Export as a static model for Paddle Inference: ``paddle.jit`` traces ``GPT.forward`` and a step with a cache.

    model.json     tokens BT -> logits BTV
    step.json      tokens BT, past -> logits BTV of the new tokens, and the longer past
    model.pdiparams   of both
    model_info.json, tokenizer.json

Shapes: B batch, T new positions, S past positions, H hidden, N heads, D head size, K keys and values, V vocabulary,
L layers.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import warnings
from pathlib import Path

import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F

from gpt.config.parameters import WORD
from gpt.config.schema import Config
from gpt.model import layers
from gpt.model.gpt import GPT
from gpt.parallel.topology import Topology
from gpt.runs.checkpoint.checkpoint import Checkpoint
from gpt.runs.convert.export_weights import end_of_text
from gpt.utils.files import atomic_directory, write_json


class CachedStep(nn.Layer):  # type: ignore[misc]
    """Incremental decoding whose cache is an argument; ``GPT.decode`` writes into memory of its own."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BT: Tensor, past_LKBSND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits BTV of new tokens, and the past with their keys and values."""
        model, m = self.model, self.model.config.model
        S, T = past_LKBSND.shape[3], tokens_BT.shape[1]
        mask_TS = paddle.arange(S + T).unsqueeze(0) <= paddle.arange(S, S + T).unsqueeze(1)
        x_BTH = model.word(tokens_BT) + model.position.lookup(paddle.arange(S, S + T))
        now = []
        for i, block in enumerate(model.layers.values()):
            qkv_BTE = block.attention.qkv(block.norm1(x_BTH))
            q, k, v = paddle.split(qkv_BTE.reshape([0, 0, m.heads, 3 * m.hidden // m.heads]), 3, axis=-1)
            k, v = (paddle.concat([past_LKBSND[i, j], new], axis=1) for j, new in enumerate((k, v)))
            now.append(paddle.stack([k, v]))
            mixed_BTND = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TS.unsqueeze([0, 1]))
            x_BTH = x_BTH + block.attention.out(mixed_BTND.reshape([0, 0, m.hidden]))
            x_BTH = x_BTH + block.mlp(block.norm2(x_BTH))
        return layers.logits(model.norm(x_BTH), model.word.weight, m.vocab), paddle.stack(now)


def export(source: Checkpoint, config: Config, topology: Topology, output: Path) -> list[str]:
    """Write the static model, its facts and its tokenizer; return the names of the files.

    Args:
        source: checkpoint.
        config: its configuration, on one rank.
        topology: of this rank, which is the only one.
        output: folder to make.

    Raises:
        OSError: the disk is full or gone; nothing is left.
    """
    m, model = config.model, _load(source, config, topology)
    tokens = paddle.static.InputSpec([None, None], "int64", "tokens")
    past = paddle.static.InputSpec([m.layers, 2, None, None, m.heads, m.hidden // m.heads], "float32", "past")
    with atomic_directory(output) as folder:
        for layer, name, inputs in ((model, "model", [tokens]), (CachedStep(model), "step", [tokens, past])):
            layer.eval()
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")  # of Paddle's tracer, about itself
                paddle.jit.save(layer, str(folder / name), input_spec=inputs)
        one, two = folder / "model.pdiparams", folder / "step.pdiparams"
        assert one.read_bytes() == two.read_bytes(), "the two programs do not store the same parameters"
        two.unlink()
        info = {
            "format": 1,
            "name": m.name,
            "step": source.state["step"],
            "vocab": m.vocab,
            "positions": m.positions,
            "layers": m.layers,
            "heads": m.heads,
            "head_size": m.hidden // m.heads,
            "eot": end_of_text(source),
            "weights": "float32",
            "tokenizer": source.tokenizer.name if source.tokenizer else None,
            "parameters": "model.pdiparams",
            "programs": {"model": "model.json", "step": "step.json"},
        }
        write_json(folder / "model_info.json", info)
        if source.tokenizer:
            shutil.copyfile(source.tokenizer, folder / source.tokenizer.name)
        return sorted(path.name for path in folder.iterdir())


def _load(source: Checkpoint, config: Config, topology: Topology) -> GPT:
    """Build the model of a checkpoint without the rows that pad its word table."""
    m, arrays, model = config.model, source.model(), GPT(config, topology)
    model.word = nn.Embedding(m.vocab, m.hidden)
    for name, p in model.logical_parameters().items():
        p.set_value(arrays[name][: m.vocab] if name == WORD else arrays[name])
    return model
