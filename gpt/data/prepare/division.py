"""Documents to sentences; joined they are the document again."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise

from gpt.config_prepare import Prepare, Sentences

Divide = Callable[[str], list[str]]


def divider(settings: Prepare) -> Divide:
    """The rule of ``prepare.sentences``.

    Raises:
        ImportError: ``punkt`` needs nltk.
        LookupError: nltk has no model of the language.

    Example:
        >>> lines("a\\nb")
        ['a\\n', 'b']
    """
    if settings.sentences is Sentences.punkt:
        return _punkt(settings.language)
    return lines if settings.sentences is Sentences.line else lambda text: [text]


def lines(text: str) -> list[str]:
    """With their ends."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def _punkt(language: str) -> Divide:
    """Kiss and Strunk, 2006, as nltk has it; what stands between two sentences goes with the first."""
    from nltk.tokenize import PunktTokenizer

    splitter = PunktTokenizer(language)

    def divide(text: str) -> list[str]:
        begins = [begin for begin, _ in splitter.span_tokenize(text)][1:]
        return [text[a:b] for a, b in pairwise([0, *begins, len(text)])]

    return divide


def problems(settings: Prepare) -> list[str]:
    """Why the rule cannot be used here, with the remedy."""
    try:
        divider(settings)
    except ImportError:
        return ["prepare.sentences=punkt needs the package nltk: pip install 'gpt-runner[sentences]'"]
    except LookupError:
        return [
            f"prepare.sentences=punkt: nltk has no model of prepare.language={settings.language}: "
            "python -m nltk.downloader punkt_tab"
        ]
    return []
