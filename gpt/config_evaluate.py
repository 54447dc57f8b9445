"""The schema's section ``evaluate``; see ``gpt.config``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from gpt.config_text import Split


class EvaluateKind(Enum):
    """What is measured."""

    split = "split"  # the loss on a split of token files
    text = "text"  # the loss on a file of raw text, tokenised with the checkpoint's tokenizer
    cloze = "cloze"  # how often the last word of a passage is found


class Detokenizer(Enum):
    """What is undone in a text that was taken apart for counting words."""

    none = "none"
    wikitext = "wikitext"


@dataclass
class Evaluate:
    """Of ``task=evaluate``."""

    kind: EvaluateKind = MISSING
    split: Split = MISSING  # of kind=split
    path: str | None = None  # of kind=text and kind=cloze: a file; .jsonl: a document per line
    json_key: str = MISSING  # where in such a line the text is
    detokenizer: Detokenizer = MISSING  # of kind=text
    stride: int | None = None  # tokens that are new in each window; None: windows side by side
    batch_size: int = MISSING  # windows or passages of one forward pass
    max_samples: int | None = None  # windows (of each set) or passages; None: all
