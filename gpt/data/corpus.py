"""Resolve the ``data`` section to token files: check them, or make them from text.

Text is tokenised once, with a byte-level BPE trained on it, into a cache folder whose name is a hash of all it
depends on. The driver does this before any rank starts.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gpt.config.schema import Config, Data, DataKind
from gpt.config.task_schemas import DocumentRule, Prepare, Sentences, TextFormat
from gpt.data import token_files, tokenizer
from gpt.data.preprocess import documents, pipeline
from gpt.data.preprocess.encode import PreprocessPlan, encode
from gpt.data.preprocess.inputs import Source
from gpt.data.preprocess.merge import FILES, merge
from gpt.utils.errors import UserError
from gpt.utils.files import Lock, atomic_directory, remove_leftovers, write_atomic

CORPUS_VERSION = 2
CACHE_FROM_TOKENS = 1 << 30  # the largest token of a smaller set is scanned each time
GPT2_EOT = 50256  # end-of-text of the published sets
MIN_PIECES = 20  # even a short single file gets a validation part


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
        """Read the JSON form."""
        return cls(**{**plain, "parts": [DatasetPart(**part) for part in plain["parts"]]})

    def plain(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    def manifests(self) -> dict[str, str]:
        """Return the SHA-256 of the manifest of each set that ``task=prepare`` made."""
        files = [token_files.manifest_path(part.path) for part in self.parts]
        return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}


def _manifests(parts: list[DatasetPart]) -> list[dict[str, Any]]:
    """Return the manifests of all parts, or none if one has none: the set came without its text."""
    try:
        return [json.loads(token_files.manifest_path(part.path).read_text(encoding="utf-8")) for part in parts]
    except FileNotFoundError:
        return []


def check(config: Config) -> list[str]:
    """Return problems with the files that the data section names; nothing is written."""
    data = config.data
    if data.kind in (DataKind.stdlib, DataKind.text):
        files = _text_files(data)
        if not files:
            why = f"no {' '.join(data.extensions)} files" if data.path and Path(data.path).exists() else "not found"
            return [f"data.path={data.path}: {why}"]
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
    """Return ``TokenSet.largest_id``, cached by size and time: a scan of 300 billion tokens takes minutes."""
    token_set = token_files.load(prefix)
    stat = token_files.paths_of(prefix)[0].stat()
    key = hashlib.sha256(f"{prefix} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:24]
    cached = cache / "largest_id" / key
    if cached.exists():
        return int(cached.read_text())
    largest = token_set.largest_id()
    if len(token_set.ids) >= CACHE_FROM_TOKENS:
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(cached, str(largest))
    return largest


def prepare(config: Config, say: Callable[[str], None] = lambda line: None) -> DatasetInfo:
    """Locate the token files, or make them. Call ``check`` first.

    Raises:
        UserError: the text is not UTF-8.
    """
    data = config.data
    if data.kind in (DataKind.stdlib, DataKind.text):
        folder = _tokenised(data, say)
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        prefix, trained = str(folder / "tokens"), folder / "tokenizer.json"
        return DatasetInfo(
            parts=[DatasetPart(prefix, 1.0)],
            fingerprint=token_files.load(prefix).fingerprint(),
            eot_id=data.eot_id if data.eot_id is not None else manifest["eot_id"],
            tokenizer=str(trained),
            tokenizer_digest=tokenizer.digest(trained),
            tokens=manifest["tokens"],
            bytes_per_token=manifest["bytes_per_token"],
            unigram_entropy=manifest["unigram_entropy"],
        )
    parts = _token_parts(data)
    sets = [token_files.load(part.path) for part in parts]
    manifests = _manifests(parts)
    eot: int | None
    if manifests:
        eot = manifests[0]["tokenizer"]["eot"]
    elif data.tokenizer:
        eot = tokenizer.open_encoder(Path(data.tokenizer)).eot
    else:
        eot = GPT2_EOT if config.model.vocab > GPT2_EOT else None
    named = Path(data.tokenizer).resolve() if data.tokenizer else None
    vocabulary = named or (token_files.tokenizer_path(parts[0].path) if manifests else None)
    total = sum(part.weight for part in parts)
    per_token = [m["bytes_per_token"] * part.weight / total for m, part in zip(manifests, parts, strict=False)]
    return DatasetInfo(
        parts=parts,
        fingerprint=hashlib.sha256(" ".join(s.fingerprint() for s in sets).encode()).hexdigest()[:16],
        eot_id=data.eot_id if data.eot_id is not None else eot,
        tokenizer=str(vocabulary) if vocabulary else None,
        tokenizer_digest=tokenizer.digest(vocabulary) if vocabulary else None,
        tokens=sum(len(s.ids) for s in sets),
        bytes_per_token=sum(per_token) if manifests else None,
        unigram_entropy=manifests[0]["unigram_entropy"] if len(manifests) == 1 else None,
    )


def _token_parts(data: Data) -> list[DatasetPart]:
    if data.kind is DataKind.blend:
        return [DatasetPart(str(Path(p.path).resolve()), p.weight) for p in data.blend]
    return [DatasetPart(str(Path(p).resolve()), 1.0) for p in token_files.prefixes_at(str(data.path))]


def _text_files(data: Data) -> list[Path]:
    """Return the text files, ordered by a hash of their names: a split by position is then a fair sample."""
    if data.kind is DataKind.stdlib:
        root = Path(sysconfig.get_path("stdlib"))
        # Tests, and tables of characters, which are not text.
        skip = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "encodings", "pydoc_data"}
        files = [p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)]
    else:
        root = Path(str(data.path))
        files = [root] if root.is_file() else [p for p in root.rglob("*") if p.suffix in data.extensions]
        root = root.parent if root.is_file() else root

    def key(path: Path) -> str:
        return hashlib.sha256(str(path.relative_to(root)).encode()).hexdigest()

    return sorted((p for p in files if p.is_file()), key=key)


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
    """Return the cache folder of a text, made if need be by exactly one process."""
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
    """Train a tokenizer on the files and encode them with the steps of ``task=prepare``, in this process."""
    total = sum(path.stat().st_size for path in files)
    piece_bytes = max(1024, min(documents.PIECE_BYTES, total // MIN_PIECES))
    settings = Prepare(
        document=DocumentRule.file,
        append_eot=True,
        sentences=Sentences.none,
        min_length=0,
        shuffle=False,
        dedup=False,
        val_share=0.0,
    )
    sources = [Source(str(path), TextFormat.text, "", path.stat().st_size, 0) for path in files]
    with TemporaryDirectory(dir=folder) as work:
        plan = PreprocessPlan(sources, settings, folder / "tokenizer.json", Path(work), piece_bytes, verbatim=True)
        trained_on = min(total, tokenizer.TRAIN_BYTES) / 1e6
        say(f"training a byte-level BPE of {vocab:,} tokens on {trained_on:.1f} MB of text")
        tokenizer.train(_head(plan), vocab, plan.tokenizer)
        encoder = tokenizer.open_encoder(plan.tokenizer)
        say(f"tokenising {total / 1e6:.1f} MB in {len(files):,} files")
        count = 0
        for chunk in pipeline.chunks(plan, pipeline.CHUNK_BYTES):
            encode(chunk, plan, encoder)
            count += 1
        figures = merge(plan, count, encoder, seed=0)[""]
        for name in FILES:
            os.replace(plan.folder / name, folder / f"tokens{name}")
    manifest = {
        "version": CORPUS_VERSION,
        **{k: figures[k] for k in ("tokens", "documents", "bytes", "bytes_per_token", "unigram_entropy")},
        "vocab": encoder.vocab,
        "eot_id": encoder.eot,
        "sizes": {path.name: path.stat().st_size for path in folder.iterdir()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _head(plan: PreprocessPlan) -> Iterator[str]:
    """Yield text to train the vocabulary on: all of it, or the first pieces in the shuffled order of files."""
    read = 0
    for source in plan.sources:
        with open(source.path, "rb") as file:
            for piece in documents.pieces(file, plan.piece_bytes):
                text = (piece.raw or b"").decode(errors="replace")  # what is not UTF-8 is refused by ``encode``
                yield text
                read += len(text)
                if read >= tokenizer.TRAIN_BYTES:
                    return
