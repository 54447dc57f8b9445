"""A text that grows token by token: what of it is sure, and whether it is over."""

from __future__ import annotations

from collections.abc import Sequence

from gpt.data.tokenizer import Encoder

ANCHOR_TOKENS = 8  # of the prompt, so that a tokenizer that writes words with their space knows what comes before
UNFINISHED = "\ufffd"  # half a character


class IncrementalDetokenizer:
    """The text of the new tokens of one sequence.

    Args:
        encoder: of the model.
        prompt: token numbers.
        stop: strings before the first of which the text ends.
    """

    def __init__(self, encoder: Encoder, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._encoder = encoder
        self._stop = stop
        self._tokens = list(prompt[-ANCHOR_TOKENS:])
        before = encoder.decode(self._tokens)
        if before.endswith(UNFINISHED):
            self._tokens, before = [], ""
        self._begin = len(before)
        self._sure = 0
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Take the next token; returns the characters that have become sure by it."""
        self._tokens.append(token)
        self.text = self._encoder.decode(self._tokens)[self._begin :]
        found = [at for s in self._stop if (at := self.text.find(s)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
            return self._up_to(len(self.text))
        sure = len(self.text.rstrip(UNFINISHED))
        return self._up_to(sure - _overlap(self.text[:sure], self._stop))

    def rest(self) -> str:
        """What has not been returned yet."""
        return self._up_to(len(self.text))

    def _up_to(self, end: int) -> str:
        new = self.text[self._sure : end]
        self._sure = max(self._sure, end)
        return new


def _overlap(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of ``text`` with which a stop string begins.

    Example:
        >>> _overlap("to be or n", ["nor", "or not"])
        4
    """
    lengths = {n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])}
    return max(lengths, default=0)
