"""Files that are either whole or not there: write beside, flush to disk, rename."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"  # prefix of what is not finished; safe to delete when nobody holds the lock


def conf_dir() -> str:
    """The folder of configuration groups: ``gpt/conf`` in a wheel, ``conf/`` beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    return next(str(d) for d in (package / "conf", package.parent / "conf") if (d / "config.yaml").is_file())


def sync_directory(path: Path) -> None:
    """Make renames inside ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace ``path`` by ``text``; after a crash or a full disk the former content is still there.

    Without ``durable`` a power cut may undo it: for what is made anew each time.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            sync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """``write_atomic`` for JSON."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_json(path: Path, value: Any) -> None:
    """Append a line of JSON in one write, so that lines of several writers do not mix."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, json.dumps(value).encode() + b"\n")
    finally:
        os.close(descriptor)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a file of JSON lines, without those that a crash tore; none if it is not there."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def short(path: Path) -> Path:
    """A path as it is shown: from the current folder, if it lies in it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


@contextlib.contextmanager
def atomic_files(*paths: Path) -> Iterator[list[Path]]:
    """Yield a name beside each path to write to; on success all are flushed and renamed, in order.

    An exception (a full disk, Ctrl-C) leaves nothing behind and what was there untouched.
    """
    temporary = [path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}") for path in paths]
    try:
        yield temporary
        for name in temporary:
            with open(name, "rb") as handle:
                os.fsync(handle.fileno())
        for name, path in zip(temporary, paths, strict=True):
            os.replace(name, path)
        for folder in {path.parent for path in paths}:
            sync_directory(folder)
    finally:
        for name in temporary:
            name.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path``; on success its files are flushed and it takes that name.

    An exception (a full disk, Ctrl-C) leaves nothing behind. If ``path`` appeared meanwhile it is kept
    and ours is dropped: both were made from the same inputs.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        sync_directory(temporary)
        try:
            os.rename(temporary, path)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        sync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Delete a folder so that a crash half-way never leaves something that looks like it."""
    doomed = path.with_name(f"{TEMPORARY}{path.name}-doomed-{os.getpid()}")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Delete what a crash left unfinished in ``folder`` (of what was to be called ``name``)."""
    for path in folder.glob(f"{TEMPORARY}{name}*") if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class Lock:
    """An advisory lock on a file, held until the last process that inherited it is gone.

    ``flock`` rather than a library, for the one property that matters here: the descriptor is handed to
    the workers, so the run stays locked if its driver is killed while they are still saving.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = -1

    def acquire(self, patience: float = 0.0) -> bool:
        """Try for ``patience`` seconds; whether we hold it now."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(self.descriptor)
                    self.descriptor = -1
                    return False
                time.sleep(0.05)
            else:
                return True

    def release(self) -> None:
        """Let go; workers that inherited the descriptor keep the lock."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def replace_section(path: Path, name: str, text: str) -> None:
    """Put figures between the markers ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` of a page.

    Raises:
        ValueError: the page has no such markers.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    head, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, ended, tail = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"{path}: no {begin} ... {end}")
    write_atomic(path, f"{head}{begin}\n{text}\n{end}{tail}")


def sha256(path: Path) -> str:
    """Of a file's content, block by block."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def cache_dir() -> str:
    """Where prepared texts and made tokenizers are kept unless ``data.cache_dir`` says otherwise."""
    folder = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return os.environ.get("GPT_CACHE") or str(Path(folder) / "gpt")
