"""SentencePiece ``.model`` files, and the Chinese CPM recipe over them."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt.config import UserError
from gpt.data.tokens import Array

# CPM's stand-ins for space and newline, which SentencePiece would treat as its own.
SPACE, NEWLINE = "\u2582", "\u2583"
ENDS = ("<eod>", "<|endoftext|>", "</s>")


def open_model(path: Path) -> SentencePiece:
    """CPM's recipe if the vocabulary has CPM's stand-ins for space and newline, else plain SentencePiece.

    Raises:
        UserError: the library is not installed, or the file is no model.
    """
    plain = SentencePiece(path)
    return Chinese(path) if plain.number(SPACE) is not None and plain.number(NEWLINE) is not None else plain


class SentencePiece:
    """A SentencePiece model; see ``gpt.data.tokenizer.Encoder``. Text is normalised as the model says."""

    def __init__(self, path: Path) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise UserError(f"{path}: a SentencePiece model needs pip install 'gpt-runner[sentencepiece]'") from error
        try:
            self._model: Any = SentencePieceProcessor(model_file=str(path))
        except Exception as error:  # RuntimeError, OSError or TypeError, by its version
            raise UserError(f"{path}: not a SentencePiece model") from error
        self.vocab: int = self._model.vocab_size()
        self.eot: int | None = next((n for end in ENDS if (n := self.number(end)) is not None), None)
        self.digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    def number(self, piece: str) -> int | None:
        """Of a piece, if the vocabulary has it."""
        number: int = self._model.piece_to_id(piece)
        return number if self._model.id_to_piece(number) == piece else None

    def encode(self, text: str) -> Array:
        """Token numbers, int32."""
        return np.array(self._model.encode(text), dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Their text, without numbers that the vocabulary does not have."""
        text: str = self._model.decode([int(t) for t in ids if t < self.vocab])
        return text


class Chinese(SentencePiece):
    """CPM's recipe: jieba cuts the text into words, spaces and newlines get stand-ins, SentencePiece does the rest.

    Words are joined by spaces, so a piece never spans two words; decoding drops those spaces again.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of setuptools' pkg_resources, which jieba asks for first
                import jieba
        except ImportError as error:
            raise UserError(f"{path}: CPM's recipe needs pip install 'gpt-runner[chinese]'") from error
        jieba.setLogLevel(logging.WARNING)
        self._cut = jieba.cut

    def encode(self, text: str) -> Array:
        """Token numbers, int32."""
        stand_in = str.maketrans({" ": SPACE, "\n": NEWLINE})
        return super().encode(" ".join(word.translate(stand_in) for word in self._cut(text)))

    def decode(self, ids: Sequence[int]) -> str:
        """Their text, with the real spaces and newlines."""
        return super().decode(ids).replace(" ", "").replace(SPACE, " ").replace(NEWLINE, "\n")
