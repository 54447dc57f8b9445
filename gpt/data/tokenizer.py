"""Text to token numbers and back: an ``Encoder`` for each kind of tokenizer file.

A byte-level BPE is trained by ``tokenizers``, kept as a ``tokenizer.json`` and applied by ``tiktoken``, which encodes
about seven times as fast and gives the same ids for the same vocabulary. Other ``tokenizer.json`` files are applied
by ``tokenizers``, ``.model`` files by SentencePiece, with the recipe of CPM (Chinese) where the vocabulary is made for
it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gpt.utils.arrays import Array
from gpt.utils.errors import UserError

if TYPE_CHECKING:
    import tiktoken


END_OF_TEXT = "<|endoftext|>"
# GPT-2's pre-tokenisation, as tiktoken writes it (possessive, so without backtracking).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# Names of the token between documents, tried in this order.
ENDS = (END_OF_TEXT, "<|end_of_text|>", "<eod>", "</s>", "[SEP]")
SENTENCEPIECE_ENDS = ("<eod>", END_OF_TEXT, "</s>")
TRAIN_BYTES = 32 << 20  # a vocabulary learns nothing new from more
# CPM's stand-ins for space and newline, which SentencePiece would treat as its own.
SPACE, NEWLINE = "\u2582", "\u2583"


class Encoder(Protocol):
    """A tokenizer. ``vocab`` counts its tokens, ``eot`` separates documents, ``digest`` is its identity."""

    vocab: int
    eot: int | None
    digest: str

    def encode(self, text: str) -> Array:
        """Return token numbers, one row of integers; names of special tokens in ``text`` are encoded as text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; half a character becomes U+FFFD, numbers without a token are left out."""


def open_encoder(path: Path) -> Encoder:
    """Open a tokenizer file.

    Raises:
        UserError: there is no such file, it is no tokenizer, or its library is not installed.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer file")
    if path.suffix == ".model":
        plain = SentencePiece(path)
        return Chinese(path) if plain.number(SPACE) is not None and plain.number(NEWLINE) is not None else plain
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        fast = _is_gpt2_like(whole)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a tokenizer.json ({type(error).__name__}: {error})") from error
    return ByteLevel(path) if fast else General(path)


class ByteLevel:
    """A byte-level BPE with GPT-2's pre-tokenisation, applied by tiktoken."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._encoding = load(path)
        self.vocab = self._encoding.n_vocab
        self.eot: int | None = self._encoding.eot_token
        self.digest = digest(path)

    def encode(self, text: str) -> Array:
        """See ``Encoder``."""
        try:
            ids: Array = self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeError:
            raise
        except ValueError:  # a run of a million spaces is too deep for tiktoken's expressions
            ids = General(self._path).encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Encoder``."""
        return self._encoding.decode([t for t in ids if t < self.vocab], errors="replace")


class General:
    """Any other ``tokenizer.json``, applied by ``tokenizers``."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more particular
            raise UserError(f"{path}: not a tokenizer.json that tokenizers reads ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.vocab = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
        self.eot: int | None = next((n for e in ENDS if (n := self._tokenizer.token_to_id(e)) is not None), None)
        self.digest = digest(path)

    def encode(self, text: str) -> Array:
        """See ``Encoder``."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Encoder``."""
        text: str = self._tokenizer.decode([t for t in ids if t < self.vocab], skip_special_tokens=False)
        return text


class SentencePiece:
    """A SentencePiece ``.model``; text is normalised by the model's rules."""

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
        self.eot: int | None = next((n for end in SENTENCEPIECE_ENDS if (n := self.number(end)) is not None), None)
        self.digest = digest(path)

    def number(self, piece: str) -> int | None:
        """Return the number of a piece, None if the vocabulary lacks it."""
        number: int = self._model.piece_to_id(piece)
        return number if self._model.id_to_piece(number) == piece else None

    def encode(self, text: str) -> Array:
        """See ``Encoder``."""
        return np.array(self._model.encode(text), dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Encoder``."""
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
                warnings.simplefilter("ignore")  # of setuptools' pkg_resources, which jieba imports
                import jieba
        except ImportError as error:
            raise UserError(f"{path}: CPM's recipe needs pip install 'gpt-runner[chinese]'") from error
        jieba.setLogLevel(logging.WARNING)
        self._cut = jieba.cut

    def encode(self, text: str) -> Array:
        """See ``Encoder``."""
        stand_in = str.maketrans({" ": SPACE, "\n": NEWLINE})
        return super().encode(" ".join(word.translate(stand_in) for word in self._cut(text)))

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Encoder``."""
        return super().decode(ids).replace(" ", "").replace(SPACE, " ").replace(NEWLINE, "\n")


def _is_gpt2_like(whole: dict[str, Any]) -> bool:
    """Return whether tiktoken gives the same ids: GPT-2's steps around a BPE whose tokens are numbered by age."""
    model, before = whole["model"], whole.get("pre_tokenizer") or {}
    vocabulary = model["vocab"]
    if model.get("type") != "BPE" or before.get("type") != "ByteLevel" or END_OF_TEXT not in vocabulary:
        return False
    if whole.get("normalizer") or before.get("add_prefix_space", True) or not before.get("use_regex", True):
        return False
    odd = ("dropout", "byte_fallback", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
    if any(model.get(setting) for setting in odd) or any(t["content"] != END_OF_TEXT for t in whole["added_tokens"]):
        return False
    made = [m.replace(" ", "") if isinstance(m, str) else "".join(m) for m in model["merges"]]
    numbers = [vocabulary[token] for token in made]
    return len(made) == len(vocabulary) - len(_byte_of()) - 1 and all(a < b for a, b in pairwise(numbers))


def train(texts: Iterable[str], vocab: int, path: Path) -> None:
    """Train a vocabulary of at most ``vocab`` tokens, end-of-text the first of them, and write it to ``path``.

    ``vocab`` is 256 bytes + 1 + merges; short texts run out of pairs and give fewer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def digest(path: Path) -> str:
    """Return the identity of a tokenizer file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def load(path: Path) -> tiktoken.Encoding:
    """Make a tiktoken encoding of a byte-level ``tokenizer.json``.

    Raises:
        UserError: the file is missing, not JSON, or not a byte-level BPE.
    """
    import tiktoken

    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        vocabulary: dict[str, int] = model["vocab"]
        alphabet = _byte_of()
        special = {END_OF_TEXT: vocabulary[END_OF_TEXT]}
        ranks = {
            bytes(alphabet[c] for c in token): number for token, number in vocabulary.items() if token not in special
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a byte-level BPE with {END_OF_TEXT} ({type(error).__name__}: {error})") from error
    return tiktoken.Encoding("gpt", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def _byte_of() -> dict[str, int]:
    """Return the byte that each printable character stands for in a ByteLevel vocabulary.

    GPT-2's table: printable Latin-1 characters stand for themselves, the other bytes for the characters
    from U+0100 on, in order.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + k): b for k, b in enumerate(others)}
