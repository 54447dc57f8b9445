"""Split the bytes of an input file into documents, and documents into sentences."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

from gpt.config.task_schemas import DocumentRule, Prepare, Sentences, TextFormat
from gpt.data.preprocess.inputs import Source

PIECE_BYTES = 64 * 1024  # a longer file becomes several documents, so that it can be split and streamed
LONGEST = 16 << 20  # bytes; bounds the memory of a worker. A longer JSON line is bad, a longer text is divided.


@dataclass(frozen=True)
class Record:
    """Bytes of a document, or the reason why there are none. ``line`` counts from 1 (rows of a parquet file too)."""

    line: int
    raw: bytes | None
    ends: bool = True  # False for all but the last piece of a divided document
    why: str = ""


def separator_test(settings: Prepare) -> Callable[[bytes], bool]:
    """Return a test for lines that stand between two documents."""
    if settings.document is DocumentRule.regex:
        pattern = re.compile(str(settings.separator).encode())
        return lambda line: pattern.search(line.rstrip(b"\r\n")) is not None
    return lambda line: not line.strip()


def by_lines(source: Source, settings: Prepare) -> bool:
    """Return whether documents end at line ends, which can be located from anywhere in the file."""
    rules = (DocumentRule.line, DocumentRule.blank_line, DocumentRule.regex)
    return source.format is TextFormat.jsonl or (source.format is TextFormat.text and settings.document in rules)


def next_start(file: BinaryIO, position: int, source: Source, settings: Prepare) -> int:
    """Return the first byte at or after ``position`` (but for 0) at which a document may begin."""
    if position <= 0:
        return 0
    file.seek(position - 1)
    _skip_line(file)
    if source.format is TextFormat.text and settings.document is not DocumentRule.line:
        is_separator = separator_test(settings)
        while line := _line(file)[0]:
            if is_separator(line):
                break
    return file.tell()


def records(
    file: BinaryIO, source: Source, settings: Prepare, end: int | None = None, piece_bytes: int = PIECE_BYTES
) -> Iterator[Record]:
    """Yield documents from the position of ``file`` to its end, or to byte ``end``, a value of ``next_start``."""
    if source.format is TextFormat.jsonl or settings.document is DocumentRule.line:
        number = 0
        while end is None or file.tell() < end:
            line, whole = _line(file)
            if not line:
                return
            number += 1
            if whole:
                yield Record(number, line)
            else:
                yield Record(number, None, why=f"a line of more than {LONGEST >> 20} MiB")
    elif settings.document is DocumentRule.file:
        yield from pieces(file, piece_bytes)
    elif settings.document is DocumentRule.literal:
        yield from _between(file, str(settings.separator).encode())
    else:
        yield from _paragraphs(file, end, separator_test(settings))


def text_of(raw: bytes, source: Source, settings: Prepare, *, allow_nul: bool = False) -> tuple[str, str]:
    """Return the text of a record and "", or "" and what is wrong with it."""
    try:
        if source.format is TextFormat.jsonl:
            row = json.loads(raw)
            if not isinstance(row, dict):
                return "", "not a JSON object"
            if settings.json_key not in row:
                return "", f"no key {settings.json_key!r}, only {', '.join(sorted(row)[:5]) or 'none'}"
            text = row[settings.json_key]
            if not isinstance(text, str):
                return "", f"{settings.json_key!r} is {type(text).__name__}, not text"
            text.encode()
        else:
            text = raw.decode()
    except UnicodeError:
        return "", "not UTF-8"
    except (ValueError, RecursionError):
        return "", "not JSON"
    return ("", "NUL bytes") if "\0" in text and not allow_nul else (text, "")


def at_character(raw: bytes, *, final: bool) -> tuple[bytes, bytes]:
    """Cut before an unfinished UTF-8 character at the end."""
    if final:
        return raw, b""
    for back in range(1, min(4, len(raw)) + 1):
        byte = raw[-back]
        if byte < 0x80:
            break
        if byte >= 0xC0:  # a lead byte: complete if as many bytes follow as it announces
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return (raw, b"") if back >= needed else (raw[:-back], raw[-back:])
    return raw, b""


def _line(file: BinaryIO) -> tuple[bytes, bool]:
    """Return the next line and whether it is whole; of a line longer than ``LONGEST`` only the beginning."""
    line = file.readline(LONGEST)
    if len(line) < LONGEST or line.endswith(b"\n"):
        return line, True
    return line, not _skip_line(file)


def _skip_line(file: BinaryIO) -> int:
    """Skip to the next line and return the number of bytes skipped."""
    skipped = 0
    while part := file.readline(1 << 20):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _paragraphs(file: BinaryIO, end: int | None, is_separator: Callable[[bytes], bool]) -> Iterator[Record]:
    kept: list[bytes] = []
    size, first, number = 0, 1, 0
    while end is None or file.tell() < end:
        line = file.readline(PIECE_BYTES)
        if not line:
            break
        begins = not kept or kept[-1].endswith(b"\n")
        if begins and line.endswith(b"\n") and is_separator(line):
            if kept:
                yield Record(first, b"".join(kept))
            kept, size = [], 0
        elif size + len(line) > LONGEST:
            whole, rest = at_character(b"".join([*kept, line]), final=False)
            yield Record(first, whole, ends=False)
            kept, size, first = [rest] if rest else [], len(rest), number + 1
        else:
            first = first if kept else number + 1
            kept.append(line)
            size += len(line)
        number += line.endswith(b"\n")
    if kept:
        yield Record(first, b"".join(kept))


def pieces(file: BinaryIO, size: int) -> Iterator[Record]:
    """Yield a whole file as one document, in pieces of about ``size`` bytes that end at a line if they can."""
    carry, first = b"", 1
    kept: Record | None = None
    while True:
        raw = file.read(size)
        raw += file.readline(size) if raw else b""
        whole, carry = at_character(carry + raw, final=not raw)
        if whole:
            if kept:
                yield kept
            kept, first = Record(first, whole, ends=False), first + whole.count(b"\n")
        if not raw:
            break
    if kept:
        yield Record(kept.line, kept.raw)


def _between(file: BinaryIO, separator: bytes) -> Iterator[Record]:
    """Yield the texts between occurrences of a separator, which may stand anywhere."""
    buffer, first = b"", 1
    while block := file.read(1 << 20):
        *whole, buffer = (buffer + block).split(separator)
        for text in whole:
            yield Record(first, text)
            first += text.count(b"\n") + separator.count(b"\n")
        if len(buffer) > LONGEST:
            text = at_character(buffer[: -len(separator)], final=False)[0]
            buffer = buffer[len(text) :]
            yield Record(first, text, ends=False)
            first += text.count(b"\n")
    if buffer:
        yield Record(first, buffer)


def sentence_splitter(settings: Prepare) -> Callable[[str], list[str]]:
    """Return the rule of ``prepare.sentences``: text to sentences, which joined are the text again.

    Raises:
        ImportError: ``punkt`` needs nltk.
        LookupError: nltk has no model of the language.
    """
    if settings.sentences is Sentences.none:
        return lambda text: [text]
    if settings.sentences is Sentences.line:
        return lambda text: re.findall(r"[^\n]*\n|[^\n]+", text)
    from nltk.tokenize import PunktTokenizer

    splitter = PunktTokenizer(settings.language)

    def punkt(text: str) -> list[str]:
        """Split by nltk's Punkt (Kiss and Strunk, 2006); text between two sentences goes with the first."""
        begins = [begin for begin, _ in splitter.span_tokenize(text)][1:]
        return [text[a:b] for a, b in pairwise([0, *begins, len(text)])]

    return punkt


def sentence_problems(settings: Prepare) -> list[str]:
    """Return why the rule of ``prepare.sentences`` cannot be used here, with the remedy."""
    try:
        sentence_splitter(settings)
    except ImportError:
        return ["prepare.sentences=punkt needs the package nltk: pip install 'gpt-runner[sentences]'"]
    except LookupError:
        return [
            f"prepare.sentences=punkt: nltk has no model of prepare.language={settings.language}: "
            "python -m nltk.downloader punkt_tab"
        ]
    return []
