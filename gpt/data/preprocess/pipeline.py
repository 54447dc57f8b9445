"""Run ``task=prepare``: check, train or copy the tokenizer, encode chunks in workers, merge the finished chunks.

Unfinished work lives in ``{output}_work_KEY``, KEY a hash of sources, tokenizer and options, where the same command
continues it. Output files are written under other names and renamed at the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpt.config.schema import Config
from gpt.config.task_schemas import Prepare, TextFormat
from gpt.data import tokenizer, tokenizer_files
from gpt.data.preprocess import documents, inputs
from gpt.data.preprocess.documents import Record
from gpt.data.preprocess.encode import Chunk, PreprocessPlan, encode_in_workers, read
from gpt.data.preprocess.inputs import STDIN, Source
from gpt.data.preprocess.merge import FILES, VAL, merge
from gpt.data.token_files import manifest_path, tokenizer_path
from gpt.data.tokenizer import TRAIN_BYTES
from gpt.utils.console import ReadProgress
from gpt.utils.errors import UserError
from gpt.utils.files import TEMPORARY, Lock, sha256, write_json

VERSION = 1
CHUNK_BYTES = 8 << 20
FIRST_RECORDS = 1000  # if all of these are bad, the format or the key is wrong
MIN_RECORDS = 10_000  # before the share of bad ones is compared with prepare.max_bad
SAMPLES = 64  # places of the corpus from which a vocabulary is trained
NOT_CONTENT = (
    "input",
    "output",
    "tokenizer",
    "workers",
    "max_bad",
)  # of the options in a key
Say = Callable[[str], None]


class TooManyBadRecords(Exception):
    """Too much of the input is unreadable; nothing was made."""


def check(config: Config) -> list[str]:
    """Return the problems with the input, the tokenizer and the output; nothing is written."""
    settings = config.prepare
    sources, problems = inputs.find(settings)
    if settings.tokenizer:
        try:
            encoder = tokenizer.open_encoder(tokenizer_files.find(settings.tokenizer, Path(config.data.cache_dir)))
        except UserError as error:
            problems.append(f"prepare.tokenizer: {error}")
        else:
            if settings.append_eot and encoder.eot is None:
                problems.append(
                    f"prepare.tokenizer={settings.tokenizer}: it has no end-of-text: prepare.append_eot=false"
                )
    problems += documents.sentence_problems(settings)
    folder = Path(str(settings.output)).parent
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK) or Path(str(settings.output)).name in ("", ".."):
        problems.append(f"prepare.output={settings.output}: cannot write in {existing}")
    return problems or _first_records(sources, config)


def _first_records(sources: list[Source], config: Config) -> list[str]:
    if sources[0].path == STDIN:
        return []  # it can be read only once
    plan = PreprocessPlan(sources, config.prepare, Path(), Path())
    bad, where = Counter[str](), ""
    records = (pair for chunk in chunks(plan, 1 << 20) for pair in read(chunk, plan))
    for source, record in itertools.islice(records, FIRST_RECORDS):
        why = record.why
        if record.raw is not None:
            why = documents.text_of(record.raw, sources[source], config.prepare)[1]
        if not why:
            return []
        bad[why] += 1
        where = where or f"{sources[source].path}:{record.line}"
    if not bad:
        return ["prepare.input: there is no text in it"]
    reasons = "; ".join(f"{why} ({count:,})" for why, count in bad.most_common(3))
    return [f"prepare.input: none of the first {bad.total():,} records is usable: {reasons}; first at {where}"]


def prepare(config: Config, say: Say, show: Callable[[ReadProgress], None], cores: int) -> dict[str, Any]:
    """Make the files and return the manifest. Call ``check`` first.

    Raises:
        UserError: another process prepares the same files.
        TooManyBadRecords: too much of the input is unreadable.
        OSError: a full disk; a worker was killed.
    """
    settings = config.prepare
    prefix = Path(str(settings.output)).absolute()
    sources, _ = inputs.find(settings)
    options = {k: getattr(v, "value", v) for k, v in asdict(settings).items() if k not in NOT_CONTENT}
    named = tokenizer_files.find(settings.tokenizer, Path(config.data.cache_dir)) if settings.tokenizer else None
    vocabulary = tokenizer.digest(named) if named else None
    content = [VERSION, CHUNK_BYTES, [s.plain() for s in sources], options, vocabulary, config.seed]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    existing = _existing(prefix, key) if sources[0].path != STDIN else None
    if existing:
        say(f"{prefix}: these files are made already, from this input and with these options")
        return existing
    prefix.parent.mkdir(parents=True, exist_ok=True)
    lock = Lock(prefix.with_name(f"{prefix.name}_prepare.lock"))
    if not lock.acquire():
        raise UserError.of([f"prepare.output={settings.output}: another process is preparing these files"])
    try:
        work = prefix.with_name(f"{prefix.name}_work_{key}")
        if sources[0].path == STDIN:
            shutil.rmtree(work, ignore_errors=True)  # it may be another text this time
        work.mkdir(exist_ok=True)
        plan = PreprocessPlan(sources, settings, work / f"tokenizer{named.suffix if named else '.json'}", work)
        _place_tokenizer(plan, named, say)
        encoder = tokenizer.open_encoder(plan.tokenizer)
        progress, count = _encode(plan, settings.workers or cores, say, show)
        manifest = {
            "version": VERSION,
            "key": key,
            "input": [
                {"path": s.path, "size": s.size, "sha256": None if s.path == STDIN else sha256(Path(s.path))}
                for s in sources
            ],
            "tokenizer": {"digest": encoder.digest, "vocab": encoder.vocab, "eot": encoder.eot},
            "options": {**options, "seed": config.seed},
            "skipped": dict(sorted(progress.counts.items())),
            "bad": progress.shown,
        }
        _require_unchanged(sources)
        sets = merge(plan, count, encoder, config.seed)
        if not sets[""]["documents"]:
            raise TooManyBadRecords("no document is left; nothing was made")
        _publish(prefix, work, sets, manifest)
        shutil.rmtree(work, ignore_errors=True)
    finally:
        lock.path.unlink(missing_ok=True)
        lock.release()
    made: dict[str, Any] = json.loads(manifest_path(str(prefix)).read_text(encoding="utf-8"))
    return made


def _existing(prefix: Path, key: str) -> dict[str, Any] | None:
    try:
        made: dict[str, Any] = json.loads(manifest_path(str(prefix)).read_text(encoding="utf-8"))
        whole = all((prefix.parent / name).stat().st_size == file["size"] for name, file in made["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return made if whole and made["key"] == key else None


def _place_tokenizer(plan: PreprocessPlan, named: Path | None, say: Say) -> None:
    """Copy the tokenizer into the work folder, or train it there on samples spread over the corpus."""
    if plan.tokenizer.exists():
        return
    temporary = plan.folder / f"{TEMPORARY}tokenizer-{os.getpid()}"
    if named:
        shutil.copyfile(named, temporary)
    else:
        say(f"training a byte-level BPE of {plan.settings.vocab:,} tokens on at most 32 MiB of the text")
        tokenizer.train(_sample(plan), plan.settings.vocab, temporary)
    os.replace(temporary, plan.tokenizer)


def _sample(plan: PreprocessPlan) -> Iterator[str]:
    """Yield the beginning of each of SAMPLES parts of the input, up to an equal share of TRAIN_BYTES."""
    total = sum(s.size for s in plan.sources)
    part, share = max(1, total // SAMPLES), TRAIN_BYTES // SAMPLES
    part = part if total > TRAIN_BYTES else share
    behind, read_here = -1, 0
    for chunk in chunks(plan, min(part, CHUNK_BYTES)):
        if chunk.progress // part != behind:
            behind, read_here = chunk.progress // part, 0
        for number, record in read(chunk, plan):
            if read_here >= share:
                break
            if record.raw is not None:
                text, why = documents.text_of(record.raw, plan.sources[number], plan.settings)
                read_here += len(record.raw)
                if not why and text.strip():
                    yield text


def chunks(plan: PreprocessPlan, size: int) -> Iterator[Chunk]:
    """Yield the input in order, in chunks of about ``size`` bytes; plain files by byte ranges, without reading them."""
    number, behind = 0, 0
    loose: list[tuple[int, Record]] = []
    held = 0
    for index, source in enumerate(plan.sources):
        spans = _spans(source, plan.settings, size)
        if spans is not None:
            if loose:
                yield Chunk(number, None, loose, behind)
                number, loose, held = number + 1, [], 0
            for first, end, done in spans:
                yield Chunk(number, (index, first, end), [], behind + done)
                number += 1
        else:
            for record, done in _unpacked(source, plan):
                loose.append((index, record))
                held += len(record.raw or b"") + 64
                if held >= size:
                    yield Chunk(number, None, loose, behind + done)
                    number, loose, held = number + 1, [], 0
        behind += source.size
    if loose:
        yield Chunk(number, None, loose, behind)


def _spans(source: Source, settings: Prepare, size: int) -> Iterator[tuple[int, int, int]] | None:
    """Return ranges of a source that workers read, each with its progress; None if it must be read in order."""
    if source.format is TextFormat.parquet:
        return _row_groups(source)
    if source.path != STDIN and not source.packing and documents.by_lines(source, settings):
        return _ranges(source, settings, size)
    return None


def _row_groups(source: Source) -> Iterator[tuple[int, int, int]]:
    from pyarrow import parquet

    with parquet.ParquetFile(source.path) as file:
        for group in range(file.num_row_groups):
            yield group, -1, (group + 1) * source.size // file.num_row_groups


def _ranges(source: Source, settings: Prepare, size: int) -> Iterator[tuple[int, int, int]]:
    with open(source.path, "rb") as file:
        first = 0
        while first < source.size:
            end = min(documents.next_start(file, first + size, source, settings), source.size)
            yield first, end, end
            first = end


def _unpacked(source: Source, plan: PreprocessPlan) -> Iterator[tuple[Record, int]]:
    """Yield records read in order; a file that is damaged or cut short ends with a bad record."""
    errors: tuple[type[Exception], ...] = (EOFError, zlib.error, OSError)
    if source.packing == ".zst":
        import zstandard

        errors = (*errors, zstandard.ZstdError)
    text, raw = source.open()
    line = 0
    try:
        for record in documents.records(text, source, plan.settings, piece_bytes=plan.piece_bytes):
            line = record.line
            yield record, raw.tell() if source.path != STDIN else 0
    except errors as error:
        if not source.packing:
            raise
        yield Record(line + 1, None, why=f"the {source.packing} is damaged or cut short ({error})"), source.size
    finally:
        if source.path != STDIN:
            text.close()
            raw.close()


def _encode(
    plan: PreprocessPlan, workers: int, say: Say, show: Callable[[ReadProgress], None]
) -> tuple[ReadProgress, int]:
    """Encode every chunk and return the progress and the number of chunks."""
    progress = ReadProgress(total=sum(s.size for s in plan.sources))
    reused = {int(p.stem) for p in plan.folder.glob("*.npz")}
    if reused:
        say(f"going on: {len(reused):,} chunks are done")
    lines: Counter[int] = Counter()  # of each source, up to the chunk
    leading, count = 0, 0
    show(progress)
    with contextlib.closing(encode_in_workers(chunks(plan, CHUNK_BYTES), plan, workers)) as encoded:
        for chunk, note in encoded:
            count = chunk.number + 1
            is_byte_range = chunk.span is not None and chunk.span[2] >= 0
            for source, line, why in note["shown"]:
                if len(progress.shown) < 20:
                    at = lines[source] + line if is_byte_range else line
                    progress.shown.append(f"{plan.sources[source].path}:{at}: {why}")
                    say(f"skipped {progress.shown[-1]}")
            if chunk.span and is_byte_range:
                lines[chunk.span[0]] += note["line"]
            leading += note["leading_bad"] if not progress.documents else 0
            progress.progress, progress.text = chunk.progress, progress.text + note["text"]
            progress.reused += note["text"] if chunk.number in reused else 0
            progress.documents, progress.records = (
                progress.documents + note["documents"],
                progress.records + note["records"],
            )
            progress.counts.update({key: note[key] for key in ("bad", "empty", "short")})
            _check_bad_share(progress, plan.settings.max_bad, leading)
            show(progress)
            if plan.settings.limit is not None and progress.documents >= plan.settings.limit:
                break
    _check_bad_share(progress, plan.settings.max_bad, leading, final=True)
    return progress, count


def _check_bad_share(progress: ReadProgress, max_bad: float, leading: int, *, final: bool = False) -> None:
    bad = progress.counts["bad"]
    if leading >= FIRST_RECORDS and leading == progress.records:
        why = f"none of the first {leading:,} records is usable"
    elif (final or progress.records >= MIN_RECORDS) and bad > max_bad * progress.records:
        why = f"{bad:,} of {progress.records:,} records are unusable, more than prepare.max_bad={max_bad:g}"
    else:
        return
    shown = "".join(f"\n  - {line}" for line in progress.shown)
    raise TooManyBadRecords(f"{why}; nothing was made{shown}")


def _require_unchanged(sources: list[Source]) -> None:
    for source in sources:
        if source.path != STDIN:
            stat = Path(source.path).stat()
            if (stat.st_size, stat.st_mtime_ns) != (source.size, source.changed):
                raise TooManyBadRecords(f"{source.path} changed while it was read; nothing was made. Start again")


def _publish(prefix: Path, work: Path, sets: dict[str, dict[str, Any]], manifest: dict[str, Any]) -> None:
    """Rename the finished files. The manifest is removed first and written last: where it exists, the set is whole."""
    made = [(ending, facts) for ending, facts in sets.items() if facts["documents"]]
    for ending in ("", VAL):
        manifest_path(f"{prefix}{ending}").unlink(missing_ok=True)
    for ending, facts in made:
        target = f"{prefix}{ending}"
        for name in FILES:
            os.replace(work / f"{ending}{name}", f"{target}{name}")
        temporary = prefix.with_name(f"{TEMPORARY}{prefix.name}-tokenizer-{os.getpid()}")
        (vocabulary,) = work.glob("tokenizer.*")
        shutil.copyfile(vocabulary, temporary)
        for former in (".json", ".model"):
            Path(f"{target}_tokenizer{former}").unlink(missing_ok=True)
        os.replace(temporary, f"{target}_tokenizer{vocabulary.suffix}")
        names = [Path(f"{target}{name}") for name in FILES] + [tokenizer_path(target)]
        files = {p.name: {"size": p.stat().st_size, "sha256": sha256(p)} for p in names}
        write_json(manifest_path(target), {**manifest, **facts, "files": files})
