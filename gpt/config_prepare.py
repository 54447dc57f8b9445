"""The schema's section ``prepare``; see ``gpt.config``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING


class TextFormat(Enum):
    """What a file of raw text is; auto: its ending says."""

    auto = "auto"
    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"


class DocumentRule(Enum):
    """Where a document of plain text ends."""

    file = "file"
    line = "line"
    blank_line = "blank_line"
    literal = "literal"  # at prepare.separator, wherever it stands
    regex = "regex"  # at a line in which prepare.separator matches


class Sentences(Enum):
    """What is a sentence within a document."""

    none = "none"
    line = "line"
    punkt = "punkt"  # as nltk finds it


@dataclass
class Prepare:
    """Of ``task=prepare``: raw text to token files."""

    input: Any = None  # a file, a folder, a glob, - for standard input, or a list of such
    output: str | None = None  # prefix of the files that are made
    tokenizer: str | None = None  # a tokenizer file; None: train a byte-level BPE of ``vocab`` tokens on the text
    vocab: int = MISSING
    format: TextFormat = MISSING
    json_key: str = MISSING  # also the column of a parquet file
    document: DocumentRule = MISSING
    separator: str | None = None
    append_eot: bool = MISSING
    sentences: Sentences = MISSING  # ``lens`` has one entry per sentence, ``docs`` still one per document
    language: str = MISSING  # of punkt's model
    min_length: int = MISSING  # characters; shorter documents are left out
    shuffle: bool = MISSING  # documents in an order that ``seed`` decides
    dedup: bool = MISSING  # of identical documents only the first stays
    val_share: float = MISSING  # of the documents, chosen by a hash of their text, into a set of their own
    limit: int | None = None  # documents to read, for trying
    max_bad: float = MISSING  # share of records that may be unreadable
    workers: int | None = None  # None: one per core
