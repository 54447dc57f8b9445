"""The whole preparation: check, tokenizer, chunks to workers, and the finished chunks put together.

Everything that is not finished lives in ``{output}_work_KEY``, KEY a hash of sources, tokenizer and options; the
same command finds it there and goes on. Output files are written under other names and renamed at the end.
"""

from __future__ import annotations

import hashlib
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
from gpt.data.corpus import TRAIN_TOKENIZER_BYTES, manifest_path, tokenizer_path
from gpt.data.preprocess import documents, inputs
from gpt.data.preprocess.documents import Record
from gpt.data.preprocess.encode import Chunk, Setup, Workers, read
from gpt.data.preprocess.inputs import STDIN, Source
from gpt.data.preprocess.merge import FILES, VAL, join
from gpt.utils.console import ReadProgress
from gpt.utils.errors import UserError
from gpt.utils.files import TEMPORARY, Lock, sha256, write_json

VERSION = 1
CHUNK_BYTES = 8 << 20
FIRST_RECORDS = 1000  # if all of these are bad, the input is not what it was taken for
JUDGE_FROM = 10_000  # records before the share of bad ones means something
SAMPLES = 64  # places of the corpus from which a vocabulary is trained
NOT_CONTENT = ("input", "output", "tokenizer", "workers", "max_bad")  # of the options: said elsewhere, or no matter
Say = Callable[[str], None]


class TooManyBadRecords(Exception):
    """Too much of the input is unreadable; nothing was made."""


def check(config: Config) -> list[str]:
    """Problems with the input, the tokenizer and the output; nothing is written."""
    settings = config.prepare
    found, problems = inputs.find(settings)
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
    problems += documents.problems(settings)
    folder = Path(str(settings.output)).parent
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK) or Path(str(settings.output)).name in ("", ".."):
        problems.append(f"prepare.output={settings.output}: cannot write in {existing}")
    return problems or _first_records(found, config)


def _first_records(found: list[Source], config: Config) -> list[str]:
    if found[0].path == STDIN:
        return []  # it comes only once
    setup = Setup(found, config.prepare, Path(), Path())
    bad, where = Counter[str](), ""
    for number, (source, record) in enumerate(_all_records(setup)):
        if number == FIRST_RECORDS:
            break
        why = record.why
        if record.raw is not None:
            why = documents.text_of(record.raw, found[source], config.prepare)[1]
        if not why:
            return []
        bad[why] += 1
        where = where or f"{found[source].path}:{record.line}"
    if not bad:
        return ["prepare.input: there is no text in it"]
    reasons = "; ".join(f"{why} ({count:,})" for why, count in bad.most_common(3))
    return [f"prepare.input: none of the first {bad.total():,} records is usable: {reasons}; first at {where}"]


def _all_records(setup: Setup) -> Iterator[tuple[int, Record]]:
    for chunk in chunks(setup, 1 << 20):
        yield from read(chunk, setup)


def prepare(config: Config, say: Say, show: Callable[[ReadProgress], None], cores: int) -> dict[str, Any]:
    """Make the files; returns the manifest. Call ``check`` first.

    Args:
        config: of the job.
        say: told in a sentence what happens.
        show: told after each chunk what has been done.
        cores: workers if ``prepare.workers`` does not say.

    Raises:
        UserError: another process prepares the same files.
        Rejected: too much of the input is unreadable.
        OSError: a full disk; a worker was killed.
    """
    settings = config.prepare
    prefix = Path(str(settings.output)).absolute()
    found, _ = inputs.find(settings)
    options = {key: value for key, value in _plain(settings).items() if key not in NOT_CONTENT}
    named = tokenizer_files.find(settings.tokenizer, Path(config.data.cache_dir)) if settings.tokenizer else None
    vocabulary = tokenizer.digest(named) if named else None
    content = [VERSION, CHUNK_BYTES, [s.plain() for s in found], options, vocabulary, config.seed]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    before = _done(prefix, key) if found[0].path != STDIN else None
    if before:
        say(f"{prefix}: these files are made already, from this input and with these options")
        return before
    prefix.parent.mkdir(parents=True, exist_ok=True)
    lock = Lock(prefix.with_name(f"{prefix.name}_prepare.lock"))
    if not lock.acquire():
        raise UserError.of([f"prepare.output={settings.output}: another process is preparing these files"])
    try:
        work = prefix.with_name(f"{prefix.name}_work_{key}")
        if found[0].path == STDIN:
            shutil.rmtree(work, ignore_errors=True)  # what comes this time may be another text
        work.mkdir(exist_ok=True)
        setup = Setup(found, settings, work / f"tokenizer{named.suffix if named else '.json'}", work)
        _tokenizer(setup, named, say)
        encoder = tokenizer.open_encoder(setup.tokenizer)
        tally, count = _encode(setup, settings.workers or cores, say, show)
        manifest = {
            "version": VERSION,
            "key": key,
            "input": [
                {"path": s.path, "size": s.size, "sha256": None if s.path == STDIN else sha256(Path(s.path))}
                for s in found
            ],
            "tokenizer": {"digest": encoder.digest, "vocab": encoder.vocab, "eot": encoder.eot},
            "options": {**options, "seed": config.seed},
            "skipped": dict(sorted(tally.counts.items())),
            "bad": tally.shown,
        }
        _unchanged(found)
        sets = join(setup, count, encoder, config.seed)
        if not sets[""]["documents"]:
            raise TooManyBadRecords("no document is left; nothing was made")
        _publish(prefix, work, sets, manifest)
        shutil.rmtree(work, ignore_errors=True)
    finally:
        lock.path.unlink(missing_ok=True)
        lock.release()
    made: dict[str, Any] = json.loads(manifest_path(str(prefix)).read_text(encoding="utf-8"))
    return made


def _plain(settings: Prepare) -> dict[str, Any]:
    return {key: getattr(value, "value", value) for key, value in asdict(settings).items()}


def _done(prefix: Path, key: str) -> dict[str, Any] | None:
    try:
        made: dict[str, Any] = json.loads(manifest_path(str(prefix)).read_text(encoding="utf-8"))
        whole = all((prefix.parent / name).stat().st_size == file["size"] for name, file in made["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return made if whole and made["key"] == key else None


def _tokenizer(setup: Setup, named: Path | None, say: Say) -> None:
    """Copy it into the work folder, or train it there on places spread over the corpus."""
    if setup.tokenizer.exists():
        return
    temporary = setup.folder / f"{TEMPORARY}tokenizer-{os.getpid()}"
    if named:
        shutil.copyfile(named, temporary)
    else:
        say(f"training a byte-level BPE of {setup.settings.vocab:,} tokens on at most 32 MiB of the text")
        tokenizer.train(_sample(setup), setup.settings.vocab, temporary)
    os.replace(temporary, setup.tokenizer)


def _sample(setup: Setup) -> Iterator[str]:
    """From every SAMPLES-th part of the input its beginning, so that no part is left out; each is read to a share."""
    total = sum(s.size for s in setup.sources)
    part, share = max(1, total // SAMPLES), TRAIN_TOKENIZER_BYTES // SAMPLES
    part = part if total > TRAIN_TOKENIZER_BYTES else share
    behind, read_here = -1, 0
    for chunk in chunks(setup, min(part, CHUNK_BYTES)):
        if chunk.progress // part != behind:
            behind, read_here = chunk.progress // part, 0
        for number, record in read(chunk, setup):
            if read_here >= share:
                break
            if record.raw is not None:
                text, why = documents.text_of(record.raw, setup.sources[number], setup.settings)
                read_here += len(record.raw)
                if not why and text.strip():
                    yield text


def chunks(setup: Setup, size: int) -> Iterator[Chunk]:
    """The input in order, in pieces of about ``size`` bytes; plain files by byte ranges, without reading them."""
    number, behind = 0, 0
    loose: list[tuple[int, Record]] = []
    held = 0
    for index, source in enumerate(setup.sources):
        spans = _spans(source, setup.settings, size)
        if spans is not None:
            if loose:
                yield Chunk(number, None, loose, behind)
                number, loose, held = number + 1, [], 0
            for first, end, done in spans:
                yield Chunk(number, (index, first, end), [], behind + done)
                number += 1
        else:
            for record, done in _unpacked(source, setup.settings):
                loose.append((index, record))
                held += len(record.raw or b"") + 64
                if held >= size:
                    yield Chunk(number, None, loose, behind + done)
                    number, loose, held = number + 1, [], 0
        behind += source.size
    if loose:
        yield Chunk(number, None, loose, behind)


def _spans(source: Source, settings: Prepare, size: int) -> Iterator[tuple[int, int, int]] | None:
    """Ranges of a source that workers read themselves, each with its progress; None if it must be read in order."""
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
            end = min(documents.cut(file, first + size, source, settings), source.size)
            yield first, end, end
            first = end


def _unpacked(source: Source, settings: Prepare) -> Iterator[tuple[Record, int]]:
    """Records read in order; what ends in the middle or is damaged gives a last record that says so."""
    errors: tuple[type[Exception], ...] = (EOFError, zlib.error, OSError)
    if source.packing == ".zst":
        import zstandard

        errors = (*errors, zstandard.ZstdError)
    text, raw = source.open()
    line = 0
    try:
        for record in documents.records(text, source, settings):
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


def _encode(setup: Setup, count: int, say: Say, show: Callable[[ReadProgress], None]) -> tuple[ReadProgress, int]:
    """Every chunk to a worker; returns the tally and the number of chunks."""
    tally = ReadProgress(total=sum(s.size for s in setup.sources))
    reused = {int(p.stem) for p in setup.folder.glob("*.npz")}
    if reused:
        say(f"going on: {len(reused):,} chunks are done")
    lines: Counter[int] = Counter()
    leading, number = 0, 0
    show(tally)
    workers = Workers(setup, count)
    try:
        for chunk, note in workers.run(chunks(setup, CHUNK_BYTES), setup.folder):
            number = chunk.number + 1
            for source, line, why in note["shown"]:
                whole = lines[source] + line if chunk.span and chunk.span[1] >= 0 and chunk.span[2] >= 0 else line
                if len(tally.shown) < 20:
                    tally.shown.append(f"{setup.sources[source].path}:{whole}: {why}")
                    say(f"skipped {tally.shown[-1]}")
            if chunk.span and chunk.span[2] >= 0:
                lines[chunk.span[0]] += note["line"]
            leading += note["leading_bad"] if not tally.documents else 0
            tally.progress, tally.text = chunk.progress, tally.text + note["text"]
            tally.reused += note["text"] if chunk.number in reused else 0
            tally.documents, tally.records = tally.documents + note["documents"], tally.records + note["records"]
            tally.counts.update({key: note[key] for key in ("bad", "empty", "short")})
            _judge(tally, setup.settings.max_bad, leading)
            show(tally)
            if setup.settings.limit is not None and tally.documents >= setup.settings.limit:
                break
    finally:
        workers.close()
    _judge(tally, setup.settings.max_bad, leading, final=True)
    return tally, number


def _judge(tally: ReadProgress, most: float, leading: int, *, final: bool = False) -> None:
    bad = tally.counts["bad"]
    if leading >= FIRST_RECORDS and leading == tally.records:
        why = f"none of the first {leading:,} records is usable"
    elif (final or tally.records >= JUDGE_FROM) and bad > most * tally.records:
        why = f"{bad:,} of {tally.records:,} records are unusable, more than prepare.max_bad={most:g}"
    else:
        return
    shown = "".join(f"\n  - {line}" for line in tally.shown)
    raise TooManyBadRecords(f"{why}; nothing was made{shown}")


def _unchanged(found: list[Source]) -> None:
    for source in found:
        if source.path != STDIN:
            stat = Path(source.path).stat()
            if (stat.st_size, stat.st_mtime_ns) != (source.size, source.changed):
                raise TooManyBadRecords(f"{source.path} changed while it was read; nothing was made. Start again")


def _described(source: Source) -> dict[str, Any]:
    """For the manifest; standard input has no hash."""
    digest = None if source.path == STDIN else sha256(Path(source.path))
    return {"path": source.path, "size": source.size, "sha256": digest}


def _publish(prefix: Path, work: Path, sets: dict[str, dict[str, Any]], manifest: dict[str, Any]) -> None:
    """Give the finished files their names. The manifest goes first and comes last: where it is, all is."""
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
