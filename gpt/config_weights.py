"""The schema's sections ``import_weights`` and ``export``; see ``gpt.config``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING


class Foreign(Enum):
    """Whose weights are read; auto: the files say."""

    auto = "auto"
    huggingface = "huggingface"
    fleetx = "fleetx"


class Target(Enum):
    """What is written."""

    huggingface = "huggingface"  # a folder for transformers
    paddle = "paddle"  # a static model for Paddle Inference
    int8 = "int8"  # the same with its matrices in eight bits


@dataclass
class ImportWeights:
    """Of ``task=import_weights``: other projects' weights to a checkpoint."""

    source: str | None = None  # a folder, or a file of weights in it
    output: str | None = None  # the checkpoint folder that is made
    format: Foreign = MISSING
    tokenizer: str | None = None  # a tokenizer file or folder, or gpt2; None: the one that lies with the weights


@dataclass
class Export:
    """Of ``task=export``: a checkpoint to a folder that others read."""

    format: Target = MISSING
    output: str | None = None  # the folder that is made
