"""Download a file: resumed where the connection broke, checked, and in place only when complete."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gpt.utils.errors import UserError
from gpt.utils.files import TEMPORARY, sha256, sync_directory, write_json

BLOCK = 1 << 20
TIMEOUT_SECONDS = 30.0
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Expected:
    """Size and hash of a file; None where unknown."""

    bytes: int | None = None
    sha256: str | None = None

    def problem(self, path: Path) -> str | None:
        """Return the problem with a file, or None."""
        size = path.stat().st_size
        if self.bytes is not None and size != self.bytes:
            return f"it has {size:,} bytes instead of {self.bytes:,}"
        if self.sha256 is not None and (digest := sha256(path)) != self.sha256:
            return f"its SHA-256 is {digest} instead of {self.sha256}"
        return None


def fetch(
    address: str, path: Path, expected: Expected, say: Callable[[str], None], *, tries: int = 6, pause: float = 1.0
) -> bool:
    """Download ``address`` (http, https or file) to ``path`` unless it exists; return whether that was necessary.

    It gives up after ``tries`` attempts without a new byte; ``pause`` (seconds) doubles from one to the next.

    Raises:
        UserError: it cannot be downloaded, or is not the expected file. ``path`` is as it was.
    """
    if path.exists():
        if problem := expected.problem(path):
            raise UserError(f"{path} is there already, but {problem}: remove it to download it again")
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    try:
        with open(part, "w+b") as file:
            _download(address, file, say, tries, pause)
            file.flush()
            os.fsync(file.fileno())
        if problem := expected.problem(part):
            raise UserError(f"{address}: what the server sent is not the file: {problem}; nothing is kept")
        os.replace(part, path)
        sync_directory(path.parent)
    finally:
        part.unlink(missing_ok=True)
    return True


def _download(address: str, file: BinaryIO, say: Callable[[str], None], tries: int, pause: float) -> None:
    tag, failures = "", 0
    while True:
        before = file.tell()
        try:
            request = urllib.request.Request(address, headers={"User-Agent": "gpt-runner"})
            if tag:  # another version of the file is sent from its beginning
                request.add_header("Range", f"bytes={before}-")
                request.add_header("If-Range", tag)
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                if response.status != 206:
                    file.seek(0)
                    file.truncate()
                tag = response.headers.get("ETag", "")
                tag = "" if tag.startswith("W/") else tag
                _copy(response, file, say)
            return
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"the server answers {error.code} {error.reason}"
            if error.code not in TRANSIENT:
                raise UserError(f"{address}: {reason}") from error
        except urllib.error.URLError as error:
            reason = str(error.reason)
        except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = f"{type(error).__name__}: {error}"
        failures = 1 if file.tell() > before else failures + 1
        if failures >= tries:
            raise UserError(f"{address}: {reason}, {tries} times in a row")
        seconds = pause * 2 ** (failures - 1)
        say(f"{reason} after {file.tell():,} bytes; once more in {seconds:.1f} s")
        time.sleep(seconds)


def _copy(response: http.client.HTTPResponse, file: BinaryIO, say: Callable[[str], None]) -> None:
    length = response.headers.get("Content-Length")
    total = file.tell() + int(length) if length else None
    last = time.monotonic()
    while block := response.read(BLOCK):
        file.write(block)
        if time.monotonic() - last >= 5.0:
            last = time.monotonic()
            say(f"{file.tell() / 1e6:,.0f} MB" + (f" of {total / 1e6:,.0f} MB" if total else ""))
    if total is not None and file.tell() < total:
        raise http.client.IncompleteRead(b"", total - file.tell())


def remember(path: Path) -> Expected:
    """Record size and hash of a file beside it, or read the record.

    Where nothing is published to check against, a later download at least has to equal the first.
    """
    record = path.with_name(f"{path.name}.sha256.json")
    if record.exists():
        return Expected(**json.loads(record.read_text(encoding="utf-8")))
    if not path.exists():
        return Expected()
    expected = Expected(path.stat().st_size, sha256(path))
    write_json(record, {"bytes": expected.bytes, "sha256": expected.sha256})
    return expected
