"""The prompts of ``task=generate``: from the command line, a file, or standard input. No Paddle here."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path

from gpt.config.schema import Config
from gpt.config.task_schemas import Generate
from gpt.data import tokenizer
from gpt.utils.errors import UserError

NO_TEXT = "the checkpoint has no tokenizer, so it has no text: train with data.tokenizer=.../tokenizer.json"
SHOWN = 5  # bad prompts that a message names


def check(config: Config, vocabulary: Path | None) -> list[str]:
    """Return the problems with a generation, each a sentence; ``vocabulary`` is the checkpoint's tokenizer."""
    settings = config.generate
    if vocabulary is None:
        return [NO_TEXT]
    replicas = config.parallel.dp_degree * config.parallel.sharding_degree
    problems = []
    if settings.interactive and settings.prompts:
        problems.append("generate.interactive=true asks for prompts itself: it does not go with generate.prompts")
    if settings.interactive and replicas > 1:
        problems.append(
            f"generate.interactive=true continues one prompt at a time: {replicas} replicas cannot share it"
        )
    if settings.output and Path(settings.output).exists():
        problems.append(f"generate.output={settings.output} exists: choose another name")
    if settings.interactive:
        return problems
    try:
        prompts = read(settings)
    except UserError as error:
        return [*problems, str(error)]
    encoder = tokenizer.open_encoder(vocabulary)
    lengths = [len(encoder.encode(prompt)) for prompt in prompts]
    positions = config.model.positions
    long = [i for i, length in enumerate(lengths) if length > positions]
    if long:
        which = ", ".join(f"{i + 1} has {lengths[i]:,}" for i in long[:SHOWN]) + (", ..." if len(long) > SHOWN else "")
        problems.append(f"a prompt is longer than the model's {positions:,} positions: prompt {which} tokens")
    empty = [str(i + 1) for i, length in enumerate(lengths) if not length]
    if empty:
        problems.append(f"a prompt is empty: prompt {', '.join(empty[:SHOWN])}; there must be something to continue")
    return problems


def read(settings: Generate) -> list[str]:
    """Return all prompts.

    Raises:
        UserError: the file cannot be read, or holds no prompts.
    """
    return [settings.prompt] if settings.prompts is None else list(_read(settings.prompts))


@functools.cache  # standard input comes only once
def _read(source: str) -> tuple[str, ...]:
    name = "standard input" if source == "-" else source
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"generate.prompts={source}: cannot be read ({error})") from None
    lines = text.splitlines()
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if not source.endswith(".jsonl"):
            prompts.append(line)
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise UserError(f'{name}, line {number}: not a JSON object with a "prompt"')
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{name} holds no prompts: there must be a line for each")
    return tuple(prompts)


def hand_over(config: Config, folder: Path) -> Config:
    """Write the prompts of a file or of standard input into ``folder``; return the configuration that reads them."""
    if config.generate.prompts is None:
        return config
    file = folder / "prompts.jsonl"
    rows = (json.dumps({"prompt": prompt}) for prompt in read(config.generate))
    file.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return replace(config, generate=replace(config.generate, prompts=str(file.resolve())))
