"""Incremental detokenizer: which characters are final after each token, and whether the text has ended."""

from __future__ import annotations

from collections.abc import Sequence

from gpt.data.tokenizer import Encoder

ANCHOR_TOKENS = 8  # of the prompt, for a tokenizer that decodes a space by what is before it
UNFINISHED = "\ufffd"  # half a character


class IncrementalDetokenizer:
    """The text of the new tokens of one sequence; it ends before the first of the ``stop`` strings."""

    def __init__(self, encoder: Encoder, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._encoder = encoder
        self._stop = stop
        self._tokens = list(prompt[-ANCHOR_TOKENS:])
        before = encoder.decode(self._tokens)
        if before.endswith(UNFINISHED):
            self._tokens, before = [], ""
        self._begin = len(before)
        self._emitted = 0
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Append a token and return the characters that are now final."""
        self._tokens.append(token)
        self.text = self._encoder.decode(self._tokens)[self._begin :]
        stops = [at for s in self._stop if (at := self.text.find(s)) >= 0]
        if stops:
            self.text, self.stopped = self.text[: min(stops)], True
            return self._up_to(len(self.text))
        whole = len(self.text.rstrip(UNFINISHED))
        return self._up_to(whole - _overlap(self.text[:whole], self._stop))

    def flush(self) -> str:
        """Return the characters that have not been returned yet."""
        return self._up_to(len(self.text))

    def _up_to(self, end: int) -> str:
        new = self.text[self._emitted : end]
        self._emitted = max(self._emitted, end)
        return new


def _overlap(text: str, stop: Sequence[str]) -> int:
    """Return the length of the longest end of ``text`` with which a stop string begins.

    Example:
        >>> _overlap("to be or n", ["nor", "or not"])
        4
    """
    lengths = {n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])}
    return max(lengths, default=0)
