"""The schema of what a trained model does: ``task=generate`` and ``serve``; see ``gpt.config``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING


class Split(Enum):
    """A part of the documents."""

    train = "train"
    val = "val"
    test = "test"


@dataclass
class Generate:
    """Of ``task=generate``, of requests to ``task=serve`` that say less, and of the sample that closes a run."""

    prompt: str = MISSING
    prompts: str | None = None  # a file of prompts, a line each (.jsonl: a "prompt" each), or - for standard input
    interactive: bool = MISSING  # a session: every line that is typed is continued
    output: str | None = None  # JSON lines with the texts go there too
    stream: bool = MISSING  # show the text as it comes
    batch_size: int = MISSING  # prompts that are continued side by side
    max_new_tokens: int = MISSING
    min_new_tokens: int = MISSING  # no end of text before
    temperature: float = MISSING
    top_k: int = MISSING
    top_p: float = MISSING
    repetition_penalty: float = MISSING
    stop: list[str] = MISSING  # the text ends before the first of these
    num_return_sequences: int = MISSING
    num_beams: int = MISSING  # more than 1: beam search, without sampling
    length_penalty: float = MISSING


@dataclass
class Serve:
    """Of ``task=serve``."""

    host: str = MISSING
    port: int = MISSING  # 0: any that is free
    api_key_env: str | None = None  # name of the environment variable with the key that clients must send
    queue: int = MISSING  # requests that may wait while another one is answered
    queue_seconds: float = MISSING  # how long one may wait
    max_body: int = MISSING  # bytes of a request
    max_texts: int = MISSING  # prompts x texts (or beams) of a request
    max_tokens: int | None = None  # new tokens of a text; null: as many as the model has positions
