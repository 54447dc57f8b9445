"""From what the user names to token files: found, checked, and made if they are not there yet.

Text is tokenised once, with a byte-level BPE trained on it, into a cache folder whose name is a hash of all it
depends on. The driver does this before any rank starts; ranks find the result.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt.config.schema import Config, Data, DataKind
from gpt.data import token_files, tokenizer
from gpt.utils.errors import UserError
from gpt.utils.files import Lock, atomic_directory, remove_leftovers, write_atomic

CORPUS_VERSION = 2
REMEMBER_FROM_TOKENS = 1 << 30
GPT2_EOT = 50256  # end-of-text of the published sets
PIECE_BYTES = 64 * 1024  # a longer file becomes several documents, so that it can be split and streamed
LEAST_PIECES = 20  # even a short single file gets a validation part
TRAIN_TOKENIZER_BYTES = 32 << 20  # a vocabulary learns nothing new from more


@dataclass(frozen=True)
class DatasetPart:
    """One token set and its share of the samples."""

    path: str
    weight: float


@dataclass(frozen=True)
class DatasetInfo:
    """Token files ready to be mapped; small enough to travel in ``job.json`` and in every checkpoint.

    ``unigram_entropy`` (nats per token) is the loss of a model that knows only how often each token occurs;
    it and ``bytes_per_token`` are None for sets that came without their text.
    """

    parts: list[DatasetPart]
    fingerprint: str
    eot_id: int | None
    tokenizer: str | None
    tokenizer_digest: str | None
    tokens: int
    bytes_per_token: float | None = None
    unigram_entropy: float | None = None

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> DatasetInfo:
        """The inverse of ``dataclasses.asdict``."""
        return cls(**{**plain, "parts": [DatasetPart(**part) for part in plain["parts"]]})

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    def manifests(self) -> dict[str, str]:
        """SHA-256 of the manifest of each set that ``task=prepare`` made."""
        files = [manifest_path(part.path) for part in self.parts]
        return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}


def manifest_path(prefix: str) -> Path:
    """What ``task=prepare`` says of a set that it made."""
    return Path(f"{token_files.bare(prefix)}_manifest.json")


def tokenizer_path(prefix: str) -> Path:
    """The tokenizer that it put beside the set: a ``tokenizer.json``, or a SentencePiece model."""
    model = Path(f"{token_files.bare(prefix)}_tokenizer.model")
    return model if model.is_file() else model.with_suffix(".json")


def _manifests(parts: list[DatasetPart]) -> list[dict[str, Any]]:
    """Those of all parts, or none: a set that came without its text says nothing."""
    try:
        return [json.loads(manifest_path(part.path).read_text(encoding="utf-8")) for part in parts]
    except FileNotFoundError:
        return []


def check(config: Config) -> list[str]:
    """Problems with the files that the data section names; nothing is written."""
    data = config.data
    if data.kind in (DataKind.stdlib, DataKind.text):
        files = _text_files(data)
        if not files:
            what = f"no {' '.join(data.extensions)} files" if data.path and Path(data.path).exists() else "not found"
            return [f"data.path={data.path}: {what}"]
        if not any(path.stat().st_size for path in files):
            return [f"data.path={data.path}: there is no text, only {len(files)} empty file(s)"]
        return [p for path in files if (p := _not_text(path))][:10]
    problems = []
    if data.tokenizer and not Path(data.tokenizer).is_file():
        problems.append(f"data.tokenizer={data.tokenizer}: no such file")
    for part in _token_parts(data):
        try:
            largest = _largest_id(part.path, Path(data.cache_dir))
        except UserError as error:
            problems.append(str(error))
        else:
            if largest >= config.model.vocab:
                problems.append(
                    f"{part.path}: token id {largest} is beyond model.vocab={config.model.vocab}: "
                    f"set model.vocab={largest + 1} or more, or choose the data that goes with the model"
                )
    digests = {m["tokenizer"]["digest"] for m in _manifests(_token_parts(data))}
    if digests and data.tokenizer and Path(data.tokenizer).is_file():
        digests.add(tokenizer.digest(Path(data.tokenizer)))
    if len(digests) > 1:
        problems.append("the sets (or data.tokenizer) are of different tokenizers: prepare them with the same one")
    return problems or ([] if _token_parts(data) else [f"data.path={data.path}: no *_idx.npz or *.idx in this folder"])


def _largest_id(prefix: str, cache: Path) -> int:
    """``TokenSet.largest_id``, remembered by the file's size and time: a scan of 300 billion tokens takes minutes."""
    token_set = token_files.load(prefix)
    stat = token_files.paths_of(prefix)[0].stat()
    key = hashlib.sha256(f"{prefix} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:24]
    note = cache / "largest_id" / key
    if note.exists():
        return int(note.read_text())
    largest = token_set.largest_id()
    if len(token_set.ids) >= REMEMBER_FROM_TOKENS:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(note, str(largest))
    return largest


def prepare(config: Config, say: Callable[[str], None] = lambda line: None) -> DatasetInfo:
    """Find the token files, or make them. Call ``check`` first.

    Args:
        config: of the job.
        say: told in a sentence what takes time.

    Raises:
        UserError: the text is not UTF-8.
    """
    data = config.data
    if data.kind in (DataKind.stdlib, DataKind.text):
        folder = _tokenised(data, say)
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        prefix, vocabulary = str(folder / "tokens"), str(folder / "tokenizer.json")
        return DatasetInfo(
            parts=[DatasetPart(prefix, 1.0)],
            fingerprint=token_files.load(prefix).fingerprint(),
            eot_id=data.eot_id if data.eot_id is not None else manifest["eot_id"],
            tokenizer=vocabulary,
            tokenizer_digest=tokenizer.digest(Path(vocabulary)),
            tokens=manifest["tokens"],
            bytes_per_token=manifest["bytes_per_token"],
            unigram_entropy=manifest["unigram_entropy"],
        )
    parts = _token_parts(data)
    sets = [token_files.load(part.path) for part in parts]
    whole = hashlib.sha256(" ".join(s.fingerprint() for s in sets).encode())
    notes = _manifests(parts)
    if notes:
        told = notes[0]["tokenizer"]["eot"]
    elif data.tokenizer:
        told = tokenizer.open_encoder(Path(data.tokenizer)).eot
    else:
        told = GPT2_EOT if config.model.vocab > GPT2_EOT else None
    beside = tokenizer_path(parts[0].path) if notes else None
    chosen = Path(data.tokenizer).resolve() if data.tokenizer else beside
    total = sum(part.weight for part in parts)
    per_token = [n["bytes_per_token"] * part.weight / total for n, part in zip(notes, parts, strict=False)]
    return DatasetInfo(
        parts=parts,
        fingerprint=whole.hexdigest()[:16],
        eot_id=data.eot_id if data.eot_id is not None else told,
        tokenizer=str(chosen) if chosen else None,
        tokenizer_digest=tokenizer.digest(chosen) if chosen else None,
        tokens=sum(len(s.ids) for s in sets),
        bytes_per_token=sum(per_token) if notes else None,
        unigram_entropy=notes[0]["unigram_entropy"] if len(notes) == 1 else None,
    )


def _token_parts(data: Data) -> list[DatasetPart]:
    if data.kind is DataKind.blend:
        return [DatasetPart(str(Path(p.path).resolve()), p.weight) for p in data.blend]
    return [DatasetPart(str(Path(p).resolve()), 1.0) for p in token_files.prefixes_at(str(data.path))]


def _text_files(data: Data) -> list[Path]:
    """The source files, in an order by hash of their names: a split by position is then a fair sample."""
    if data.kind is DataKind.stdlib:
        root = Path(sysconfig.get_path("stdlib"))
        # Tests, and tables of characters, which are no one's idea of text.
        skip = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "encodings", "pydoc_data"}
        found = [p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)]
    else:
        root = Path(str(data.path))
        found = [root] if root.is_file() else [p for p in root.rglob("*") if p.suffix in data.extensions]
        root = root.parent if root.is_file() else root

    def key(path: Path) -> str:
        return hashlib.sha256(str(path.relative_to(root)).encode()).hexdigest()

    return sorted((p for p in found if p.is_file()), key=key)


def _not_text(path: Path) -> str | None:
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return f"{path}: not UTF-8 (byte 0x{head[error.start]:02x} at {error.start}): convert or leave it out"
    return None


def _tokenised(data: Data, say: Callable[[str], None]) -> Path:
    """The cache folder of a text, made if need be by exactly one process."""
    files = _text_files(data)
    stats = [(str(path), path.stat()) for path in files]
    described = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    digest = hashlib.sha256(json.dumps([CORPUS_VERSION, data.vocab, described]).encode()).hexdigest()
    folder = Path(data.cache_dir) / "corpus" / f"{data.kind.value}-{digest[:24]}"
    if _complete(folder):
        return folder
    lock = Lock(folder.with_suffix(".lock"))
    if not lock.acquire(0.0):
        say("another process is preparing this text; waiting for it")
        lock.acquire(float("inf"))
    try:
        remove_leftovers(folder.parent, folder.name)
        if not _complete(folder):
            with atomic_directory(folder) as fresh:
                _tokenise(files, data.vocab, fresh, say)
    finally:
        lock.release()
    return folder


def _complete(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in manifest["sizes"].items())
    except (OSError, ValueError, KeyError):
        return False


def _tokenise(files: list[Path], vocab: int, folder: Path, say: Callable[[str], None]) -> None:
    total = sum(path.stat().st_size for path in files)
    say(f"training a byte-level BPE of {vocab:,} tokens on {min(total, TRAIN_TOKENIZER_BYTES) / 1e6:.1f} MB of text")
    size = max(1024, min(PIECE_BYTES, total // LEAST_PIECES))
    tokenizer.train(_head(files, size), vocab, folder / "tokenizer.json")
    encoding = tokenizer.load(folder / "tokenizer.json")
    eot = encoding.eot_token
    say(f"tokenising {total / 1e6:.1f} MB in {len(files):,} files")
    dtype = np.dtype(np.uint16 if encoding.n_vocab <= 1 << 16 else np.int32)
    counts = np.zeros(encoding.n_vocab, dtype=np.int64)
    lens: list[int] = []
    with open(folder / "tokens_ids.npy", "w+b") as out:
        token_files.write_header(out, dtype, 0)
        for piece, last in pieces(files, size):
            ids = encoding.encode_to_numpy(piece, disallowed_special=())
            ids = np.append(ids, eot) if last else ids
            counts += np.bincount(ids, minlength=len(counts))
            lens.append(len(ids))
            out.write(ids.astype(dtype).tobytes())
        token_files.write_header(out, dtype, sum(lens))
    np.savez(
        folder / "tokens_idx.npz",
        lens=np.array(lens, dtype=np.int32),
        docs=np.arange(len(lens) + 1, dtype=np.int64),
    )
    share = counts[counts > 0] / counts.sum()
    manifest = {
        "version": CORPUS_VERSION,
        "tokens": int(counts.sum()),
        "documents": len(lens),
        "bytes": total,
        "bytes_per_token": total / int(counts.sum()),
        "unigram_entropy": float(-(share * np.log(share)).sum()),
        "vocab": encoding.n_vocab,
        "eot_id": eot,
        "sizes": {path.name: path.stat().st_size for path in folder.iterdir()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _head(files: list[Path], size: int) -> Iterator[str]:
    """Text to train the vocabulary on: all of it, or the first pieces in the shuffled order of files."""
    read = 0
    for piece, _ in pieces(files, size):
        yield piece
        read += len(piece)
        if read >= TRAIN_TOKENIZER_BYTES:
            return


def pieces(files: list[Path], size: int) -> Iterator[tuple[str, bool]]:
    """All text in pieces of about ``size`` bytes that end at a line if they can, one at a time in memory.

    Yields:
        The piece, and whether it ends its file.
    """
    for path in files:
        left = path.stat().st_size
        with open(path, "rb") as file:
            carry = b""
            while left > 0:
                raw = file.read(size) + file.readline(size)
                left = left - len(raw) if raw else 0
                whole, carry = at_character(carry + raw, final=left <= 0)
                try:
                    text = whole.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}: not UTF-8 ({error}): convert or leave it out") from error
                if text:
                    yield text, left <= 0


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
