"""Sample: continue a prompt, one token at a time, with cached keys and values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from gpt import checkpoint
from gpt.config import UserError
from gpt.config_text import Generate
from gpt.data import tokenizer
from gpt.data.tokens import Array
from gpt.engine import Engine
from gpt.log import say
from gpt.model import GPT
from gpt.runs import Job
from gpt.topology import Topology, derive_seed


def run(job: Job) -> int:
    """Continue ``generate.prompt`` with the run's newest checkpoint; returns the exit code."""
    found = checkpoint.require(Path(str(job.config.checkpoint)), lambda line: say(f"WARNING: {line}"))
    if found.tokenizer is None:
        raise UserError(f"{found.path} has no tokenizer; train with data.tokenizer=.../tokenizer.json to sample text")
    engine = Engine(job.config, Topology.connect(job.config), train=False)
    engine.load(found.model(), None, {})
    texts = continuations(job, engine, found.tokenizer)
    _record(job, found.state["step"], texts)
    for number, text in enumerate(texts, start=1):
        say(f"--- sample {number} of {len(texts)} (step {found.state['step']:,}) ---")
        say(f"{job.config.generate.prompt}{text}")
    return 0


def sample_text(job: Job, engine: Engine, step: int) -> None:
    """The sample that closes a training run."""
    if job.data.tokenizer is None:
        say("no sample: the data has no tokenizer (data.tokenizer=.../tokenizer.json)")
        return
    texts = continuations(job, engine, Path(job.data.tokenizer))
    _record(job, step, texts)
    say(f"--- sample (step {step:,}) ---\n{job.config.generate.prompt}{texts[0]}\n---")


def _record(job: Job, step: int, texts: list[str]) -> None:
    with open(job.run_dir / "samples.jsonl", "a", encoding="utf-8") as file:
        for text in texts:
            row = {"step": step, "prompt": job.config.generate.prompt, "text": text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def continuations(job: Job, engine: Engine, vocabulary: Path) -> list[str]:
    """Texts that follow the prompt, up to end-of-text or ``generate.max_new_tokens`` tokens."""
    encoder = tokenizer.open_encoder(vocabulary)
    settings = job.config.generate
    prompt = encoder.encode(settings.prompt).tolist()
    rows = generate(engine.model, prompt, settings, job.config.seed, encoder.eot)
    return [encoder.decode(row) for row in rows]


def generate(model: GPT, prompt: list[int], settings: Generate, seed: int, eot: int | None) -> list[list[int]]:
    """New tokens of ``settings.num_return_sequences`` independent continuations, end-of-text not included.

    When the model's positions are used up, it goes on from the last half of the text.
    """
    model.eval()
    positions = model.config.model.positions
    rngs = [np.random.default_rng(derive_seed(seed, "sample", i)) for i in range(settings.num_return_sequences)]
    rows = [list(prompt) for _ in rngs]
    done = [False] * len(rows)
    new, cache = [row[-positions:] for row in rows], None
    for _ in range(settings.max_new_tokens):
        if cache is not None and cache[0][0].shape[1] + 1 > positions:
            new, cache = [row[-(positions // 2 or 1) :] for row in rows], None
        with paddle.no_grad():
            logits_BV, cache = model.step(paddle.to_tensor(np.array(new, dtype=np.int64)), cache)
        host_BV = logits_BV.astype("float32").numpy()
        new = []
        for i, rng in enumerate(rngs):
            token = choose(host_BV[i], settings, rng)
            done[i] = done[i] or token == eot
            rows[i].append(token)
            new.append([token])
        if all(done):
            break
    return [_until(row[len(prompt) :], eot) for row in rows]


def choose(logits_V: Array, settings: Generate, rng: np.random.Generator) -> int:
    """Draw one token: temperature, then the top k (ties kept), then the smallest set of mass top p (Holtzman 2019).

    Args:
        logits_V: float32.
        settings: temperature 0 takes the largest; top_k 0 and top_p 1 are off.
        rng: advanced by one draw.
    """
    if settings.temperature == 0:
        return int(logits_V.argmax())
    scaled: Any = logits_V.astype(np.float64) / settings.temperature
    if 0 < settings.top_k < len(scaled):
        scaled[scaled < np.partition(scaled, -settings.top_k)[-settings.top_k]] = -np.inf
    probability = np.exp(scaled - scaled.max())
    probability /= probability.sum()
    if settings.top_p < 1:
        order = np.argsort(-probability, kind="stable")
        mass_before = np.cumsum(probability[order]) - probability[order]
        probability[order[mass_before >= settings.top_p]] = 0.0
        probability /= probability.sum()
    return int(rng.choice(len(probability), p=probability))


def _until(tokens: list[int], eot: int | None) -> list[int]:
    return tokens[: tokens.index(eot)] if eot in tokens else tokens
