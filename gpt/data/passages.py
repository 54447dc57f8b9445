"""Raw text that a model is measured on: documents of a file, WikiText made readable again, and a last word to find."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from gpt.config import UserError
from gpt.config_evaluate import Detokenizer, Evaluate, EvaluateKind
from gpt.config_prepare import DocumentRule, Prepare, TextFormat
from gpt.data.prepare import documents
from gpt.data.prepare.sources import FORMATS, Source, ending_of

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


def detokenize(text: str, kind: Detokenizer) -> str:
    """Undo what was done to a text to count its words.

    Example:
        >>> detokenize("a 2 @.@ 5 @-@ inch gun , ( or two ) . It 's", Detokenizer.wikitext)
        "a 2.5-inch gun, (or two). It's"
    """
    if kind is Detokenizer.wikitext:
        for pattern, replacement in WIKITEXT:
            text = re.sub(pattern, replacement, text)
    return text


def last_word(text: str) -> tuple[str, str]:
    """A passage without its last word, and that word with the space before it (Paperno et al., 2016).

    Example:
        >>> last_word("They talked about the weather")
        ('They talked about the', ' weather')
    """
    word = text.rsplit(maxsplit=1)[-1]
    return text[: text.rindex(word)].strip(), f" {word}"


def read(settings: Evaluate) -> list[str]:
    """The documents of ``settings.path`` as they are there.

    Raises:
        UserError: what ``problems`` lists.
    """
    found = problems(settings)
    if found:
        raise UserError.of(found)
    return [text for _, text, _ in _documents(settings)]


def problems(settings: Evaluate) -> list[str]:
    """What is wrong with the file, each a sentence; the file is read whole."""
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
    """Line (0: the whole file), text, and what is wrong with it."""
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
