"""Evaluation data: text files, and rows of tokens to score as overlapping windows or as continuations of contexts.

``Batch.mask_BT`` says which tokens count, as in training. Shorter rows are padded at the end with token 0, which no
earlier position attends to.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from gpt.config.task_schemas import Detokenizer, DocumentRule, Evaluate, EvaluateKind, Prepare, TextFormat
from gpt.data import token_files
from gpt.data.dataset import Batch
from gpt.data.preprocess import documents
from gpt.data.preprocess.inputs import FORMATS, Source, ending_of
from gpt.data.token_files import TokenSet
from gpt.utils.arrays import Array
from gpt.utils.errors import UserError

SHOWN = 10  # problems of one file

# WikiText's .tokens files have spaces around punctuation and marks within numbers and compounds. These are the
# substitutions, in this order, that published figures of GPT-2's kind rest on (Megatron-LM's, Shoeybi et al., 2019).
WIKITEXT = (
    (r"s '", "s'"),
    *((rf" @\{mark}@ ", mark) for mark in "-,."),
    *((rf" \{mark} ", f"{mark} ") for mark in ":;.!?,"),
    (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="),
    (r"= = =", "==="),
    (r"= =", "=="),
    (r" ° ", "°"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", " 1 "),
    (r" 's", "'s"),
)


class EvalRows(Protocol):
    """Rows to score."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def batch(self, first: int, count: int) -> Batch:
        """Return rows ``first`` to ``first`` + ``count``."""


@dataclass(frozen=True)
class Windows:
    """Windows over a row of tokens, of which every token but the first counts in exactly one.

    The first window counts whole; each later one begins ``stride`` tokens after the one before it, and only the
    tokens that are new in it count, so that they have ``length`` - ``stride`` tokens or more before them.

    Attributes:
        ids: tokens, of which the windows see those from ``start`` up to ``stop``.
        start: of the row.
        stop: of the row.
        length: tokens that the model sees at once.
        stride: 1 to ``length``; ``length``: side by side.
        eot_id: what follows it does not count, since it is another document; None: all count.

    Example:
        >>> row = Windows(np.arange(8), 0, 8, length=4, stride=2, eot_id=None).batch(0, 3)
        >>> [labels[mask > 0].tolist() for labels, mask in zip(row.labels_BT, row.mask_BT)]
        [[1, 2, 3, 4], [5, 6], [7]]
    """

    ids: Array
    start: int
    stop: int
    length: int
    stride: int
    eot_id: int | None

    def __len__(self) -> int:
        """Return the number of windows."""
        beyond = self.stop - self.start - 1 - self.length
        return 0 if self.stop - self.start < 2 else 1 + max(0, -(-beyond // self.stride))

    def batch(self, first: int, count: int) -> Batch:
        """See ``EvalRows``."""
        rows, counts_from = [], []
        for number in range(first, first + count):
            begin = self.start + number * self.stride
            rows.append(self.ids[begin : min(begin + self.length + 1, self.stop)])
            counts_from.append(self.length - self.stride if number else 0)
        return _padded(rows, counts_from, self.eot_id)

    def counted(self) -> int:
        """Return the number of tokens that count in all windows."""
        inputs = self.ids[self.start : self.stop - 1]
        return len(inputs) - (int((inputs == self.eot_id).sum()) if self.eot_id is not None else 0)


class Continuations:
    """Contexts with a continuation each, which alone counts; longest first, so that a batch has similar lengths.

    Args:
        contexts: tokens, at least one each.
        endings: tokens; of more than ``length`` the last ones count.
        length: tokens that the model sees at once; of what is too long the beginning is cut off.
    """

    def __init__(self, contexts: Sequence[Array], endings: Sequence[Array], length: int) -> None:
        pairs = list(zip(contexts, endings, strict=True))
        self.order = sorted(range(len(pairs)), key=lambda i: -sum(len(part) for part in pairs[i]))
        self.cut = sum(len(context) + len(ending) > length + 1 for context, ending in pairs)
        self._rows = [np.concatenate(pairs[i])[-length - 1 :] for i in self.order]
        self._counts_from = [
            max(0, len(row) - 1 - len(endings[i])) for row, i in zip(self._rows, self.order, strict=True)
        ]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def batch(self, first: int, count: int) -> Batch:
        """See ``EvalRows``."""
        return _padded(self._rows[first : first + count], self._counts_from[first : first + count], None)


def _padded(rows: list[Array], counts_from: list[int], eot_id: int | None) -> Batch:
    shape = (len(rows), max(len(row) for row in rows) - 1)
    inputs, labels = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.float32)
    for i, (row, first) in enumerate(zip(rows, counts_from, strict=True)):
        last = len(row) - 1
        inputs[i, :last], labels[i, :last] = row[:-1], row[1:]
        mask[i, first:last] = 1.0
    if eot_id is not None:
        mask[inputs == eot_id] = 0.0
    return Batch(inputs, labels, mask)


def of_split(
    token_set: TokenSet, shares: list[float], number: int, length: int, stride: int, eot: int | None
) -> Windows:
    """Return windows over split ``number`` of a token set, whose ``shares`` are ``data.split``; see ``Windows``.

    Raises:
        UserError: the split has nothing to predict.
    """
    bounds = token_files.split_bounds(token_set.documents, shares)
    ends = token_set.document_ends
    start, stop = (int(ends[bounds[number + i] - 1]) if bounds[number + i] else 0 for i in (0, 1))
    if stop - start < 2:
        raise UserError(
            f"{token_set.prefix}: the {('train', 'val', 'test')[number]} split has {max(stop - start, 0)} tokens, "
            f"nothing to predict: give more text or change data.split={shares}"
        )
    return Windows(token_set.ids, start, stop, length, stride, eot)


def detokenize(text: str, kind: Detokenizer) -> str:
    """Undo the tokenisation of a published text.

    Example:
        >>> detokenize("a 2 @.@ 5 @-@ inch gun , ( or two ) . It 's", Detokenizer.wikitext)
        "a 2.5-inch gun, (or two). It's"
    """
    if kind is Detokenizer.wikitext:
        for pattern, replacement in WIKITEXT:
            text = re.sub(pattern, replacement, text)
    return text


def last_word(text: str) -> tuple[str, str]:
    """Split a passage into all but its last word, and that word with the space before it (Paperno et al., 2016).

    Example:
        >>> last_word("They talked about the weather")
        ('They talked about the', ' weather')
    """
    word = text.rsplit(maxsplit=1)[-1]
    return text[: text.rindex(word)].rstrip(), f" {word}"


def read(settings: Evaluate) -> list[str]:
    """Return the documents of ``settings.path``.

    Raises:
        UserError: what ``problems`` lists.
    """
    if listed := problems(settings):
        raise UserError.of(listed)
    return [text for _, text, _ in _documents(settings)]


def problems(settings: Evaluate) -> list[str]:
    """Return the problems with the file, each a sentence; the whole file is read."""
    name, count, bad = f"evaluate.path={settings.path}", 0, []
    path = Path(str(settings.path))
    if not path.is_file():
        return [f"{name}: {'a folder; name one file' if path.is_dir() else 'no such file'}"]
    if ending_of(path)[0] == ".parquet":
        return [f"{name}: text and .jsonl are read (also .gz and .zst), not .parquet"]
    try:
        for line, text, unreadable in _documents(settings):
            short = settings.kind is EvaluateKind.cloze and len(text.split()) < 2
            why = unreadable or ("fewer than two words: one to find, and others before it" if short else "")
            bad += [f"{name}, line {line}: {why}" if line else f"{name}: {why}"] if why else []
            count += bool(text.strip())
    except (OSError, EOFError, zlib.error) as error:
        return [f"{name}: it cannot be read ({error})"]
    except ImportError as error:
        return [f"{name}: reading it needs the package {error.name}: pip install 'gpt-runner[data]'"]
    if not bad and not count:
        return [f"{name}: there is no text in it"]
    if len(bad) > SHOWN:
        bad[SHOWN:] = [f"{name}: and {len(bad) - SHOWN:,} more lines like these"]
    return bad


def _documents(settings: Evaluate) -> Iterator[tuple[int, str, str]]:
    """Yield line (0: the whole file), text, and its problem."""
    path = Path(str(settings.path))
    ending, packing = ending_of(path)
    by_line = FORMATS.get(ending) is TextFormat.jsonl or settings.kind is EvaluateKind.cloze
    form = TextFormat.jsonl if FORMATS.get(ending) is TextFormat.jsonl else TextFormat.text
    source = Source(str(path), form, packing, path.stat().st_size, 0)
    rules = Prepare(document=DocumentRule.line, json_key=settings.json_key)
    file, under = source.open()
    with file, under:
        if not by_line:
            yield (0, *documents.text_of(file.read(), source, rules))
            return
        for record in documents.records(file, source, rules):
            if record.raw is None:
                yield record.line, "", record.why
            elif record.raw.strip():
                yield (record.line, *documents.text_of(record.raw, source, rules))
