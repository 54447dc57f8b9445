"""Resolve ``prepare.input`` to files, and read their bytes: plain, .gz, .zst, or standard input."""

from __future__ import annotations

import glob
import gzip
import io
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from gpt.config.task_schemas import Prepare, TextFormat
from gpt.utils.errors import UserError

STDIN = "-"
FORMATS = {
    ".txt": TextFormat.text,
    ".md": TextFormat.text,
    ".jsonl": TextFormat.jsonl,
    ".ndjson": TextFormat.jsonl,
    ".parquet": TextFormat.parquet,
}
PACKED = (".gz", ".zst")


@dataclass(frozen=True)
class Source:
    """A file (or ``-`` for standard input) and its state when it was listed."""

    path: str
    format: TextFormat
    packing: str  # "", ".gz" or ".zst"
    size: int
    changed: int  # nanoseconds

    def plain(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**asdict(self), "format": self.format.value}

    def open(self) -> tuple[BinaryIO, BinaryIO]:
        """Open the text as bytes, and the file under it, whose position is the progress."""
        if self.path == STDIN:
            return sys.stdin.buffer, sys.stdin.buffer
        raw = open(self.path, "rb")  # noqa: SIM115
        if self.packing == ".gz":
            return cast(BinaryIO, gzip.GzipFile(fileobj=raw)), raw
        if self.packing == ".zst":
            return cast(BinaryIO, io.BufferedReader(_Zst(raw), 1 << 20)), raw
        return raw, raw


class _Zst(io.RawIOBase):
    """Reader of the frames of a .zst file; unlike the library's it raises if the last is cut short."""

    def __init__(self, packed: BinaryIO) -> None:
        import zstandard

        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._packed = packed
        self._rest = b""  # packed, of the next frame
        self._text = b""

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, into: Any) -> int:
        """Read some bytes of text; raise EOFError if the file ends within a frame."""
        while not self._text:
            packed = self._rest or self._packed.read(1 << 17)
            if not packed and self._frame:
                raise EOFError("it ends within a frame")
            if not packed:
                return 0
            self._frame = self._frame or self._new()
            self._text, self._rest = self._frame.decompress(packed), b""
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(into), len(self._text))
        into[:count], self._text = self._text[:count], self._text[count:]
        return count


def find(settings: Prepare) -> tuple[list[Source], list[str]]:
    """Return all sources in the order in which they are read, and their problems.

    Folders and globs are listed by name; a file that is named twice is read once.
    """
    named = [settings.input] if isinstance(settings.input, str) else list(settings.input or [])
    by_path: dict[str, Source] = {}
    problems = []
    for name in named:
        try:
            paths = _paths(str(name))
            for path in paths:
                by_path.setdefault(path, _source(path, settings.format))
        except (UserError, OSError) as error:
            problems.append(f"prepare.input: {error}")
    sources = list(by_path.values())
    problems += _missing_packages(sources)
    if any(s.path == STDIN for s in sources) and len(sources) > 1:
        problems.append("prepare.input: - (standard input) goes alone")
    return sources, problems


def _paths(name: str) -> list[str]:
    if name == STDIN:
        return [STDIN]
    path = Path(name)
    if path.is_dir():
        inside = [p for p in path.rglob("*") if p.is_file() and ending_of(p)[0] in FORMATS]
        if not inside:
            raise UserError(f"{name}: no {' '.join(FORMATS)} in this folder (also with {' '.join(PACKED)})")
        return sorted(str(p) for p in inside)
    if path.exists():
        return [name]
    matched = sorted(p for p in glob.glob(name, recursive=True) if Path(p).is_file())
    if not matched:
        raise UserError(f"{name}: not found")
    return matched


def ending_of(path: Path) -> tuple[str, str]:
    """Return the ending of the format, and that of the compression.

    Example:
        >>> ending_of(Path("a.jsonl.gz"))
        ('.jsonl', '.gz')
    """
    packing = path.suffix if path.suffix in PACKED else ""
    return Path(path.name.removesuffix(packing)).suffix, packing


def _source(path: str, wanted: TextFormat) -> Source:
    if path == STDIN:
        return Source(STDIN, TextFormat.jsonl if wanted is TextFormat.auto else wanted, "", 0, 0)
    ending, packing = ending_of(Path(path))
    form = FORMATS.get(ending) if wanted is TextFormat.auto else wanted
    if form is None:
        raise UserError(
            f"{path}: what is {ending or 'a file without ending'}? say prepare.format=text, jsonl or parquet"
        )
    with open(path, "rb"):  # raises if it is unreadable
        stat = Path(path).stat()
    return Source(path, form, packing, stat.st_size, stat.st_mtime_ns)


def _missing_packages(sources: list[Source]) -> list[str]:
    needed = {"zstandard": ".zst"} if any(s.packing == ".zst" for s in sources) else {}
    if any(s.format is TextFormat.parquet for s in sources):
        needed["pyarrow"] = ".parquet"
    problems = []
    for package, ending in needed.items():
        try:
            __import__(package)
        except ImportError:
            problems.append(f"reading {ending} needs the package {package}: pip install 'gpt-runner[data]'")
    return problems
