"""Files from the network: resumed, retried, checked, and there only when whole.

What has arrived is kept as ``.tmp-NAME.part``, so a second start goes on where the first one ended.
"""

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

from gpt.utils.errors import UserError
from gpt.utils.files import TEMPORARY, Lock, sha256, sync_directory, write_json

BLOCK = 1 << 20
TIMEOUT_SECONDS = 30.0
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


class Refused(Exception):
    """The server's answer will not change by asking again."""


@dataclass(frozen=True)
class Wanted:
    """What a file must be; None where it is not known."""

    bytes: int | None = None
    sha256: str | None = None


def problem(path: Path, wanted: Wanted) -> str | None:
    """What is wrong with a file, or None."""
    size = path.stat().st_size
    if wanted.bytes is not None and size != wanted.bytes:
        return f"it has {size:,} bytes instead of {wanted.bytes:,}"
    if wanted.sha256 is not None and (found := sha256(path)) != wanted.sha256:
        return f"its SHA-256 is {found} instead of {wanted.sha256}"
    return None


def fetch(
    address: str,
    path: Path,
    wanted: Wanted,
    say: Callable[[str], None],
    *,
    tries: int = 6,
    pause: float = 1.0,
) -> bool:
    """Have the file at ``path``; returns whether anything was downloaded.

    Args:
        address: http(s) or file.
        path: where it belongs; its folder is made.
        wanted: what the content must be.
        say: told of progress and of every failure.
        tries: attempts without a single new byte before giving up; the pause doubles from one to the next.
        pause: seconds before the second attempt.

    Raises:
        UserError: it cannot be had, or is not what it must be. ``path`` is as it was.
    """
    if path.exists():
        wrong = problem(path, wanted)
        if wrong is None:
            return False
        raise UserError(f"{path} is there already, but {wrong}: remove it to download it again")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{TEMPORARY}{path.name}.part")
    lock = Lock(path.with_name(f"{TEMPORARY}{path.name}.lock"))
    if not lock.acquire():
        raise UserError(f"{path}: another process is downloading it")
    try:
        _fetch(address, part, wanted, say, tries, pause)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_directory(path.parent)
    finally:
        lock.path.unlink(missing_ok=True)
        lock.release()
    return True


def _fetch(address: str, part: Path, wanted: Wanted, say: Callable[[str], None], tries: int, pause: float) -> None:
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            total = _transfer(address, part, wanted, say)
        except Refused as error:
            raise UserError(f"{address}: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.filename:
                raise  # of this disk, not of the network
            now = part.stat().st_size if part.exists() else 0
            failures = failures + 1 if now <= before else 1
            if failures >= tries:
                raise UserError(
                    f"{address}: {_reason(error)}, {tries} times in a row; {now:,} bytes are kept: "
                    f"the same command goes on from there"
                ) from error
            seconds = pause * 2 ** (failures - 1)
            say(f"{_reason(error)} after {now:,} bytes; once more in {seconds:.1f} s")
            time.sleep(seconds)
            continue
        wrong = problem(part, Wanted(wanted.bytes if wanted.bytes is not None else total, wanted.sha256))
        if wrong:
            part.unlink()
            raise UserError(f"{address}: what the server sent is not the file: {wrong}; nothing is kept")
        return


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, ConnectionError) else f"{type(error).__name__}: {error}"


def _transfer(address: str, part: Path, wanted: Wanted, say: Callable[[str], None]) -> int | None:
    """Append what is missing to ``part``; returns the whole file's size if the server tells it."""
    have = part.stat().st_size if part.exists() else 0
    note = part.with_suffix(".etag")
    request = urllib.request.Request(address, headers={"User-Agent": "gpt-runner", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        if note.exists():
            request.add_header("If-Range", note.read_text(encoding="utf-8"))  # another version: sent from its beginning
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:  # nothing beyond what we have: the check tells whether that is all
            return None
        if error.code in TRANSIENT:
            raise ConnectionError(f"the server answers {error.code} {error.reason}") from None
        raise Refused(f"the server answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise ConnectionError(str(error.reason)) from error
    with answer:
        resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if answer.status == 206 and not resumed:
            raise Refused(f"the server sent {answer.headers.get('Content-Range')} when asked for bytes from {have}")
        start = have if resumed else 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length else None
        if total is not None and wanted.bytes is not None and total != wanted.bytes:
            raise Refused(f"the server's file has {total:,} bytes instead of {wanted.bytes:,}")
        if have and not resumed:
            say("the server cannot resume this file: it is sent from its beginning")
        tag = answer.headers.get("ETag", "")
        if tag.startswith('"'):
            note.write_text(tag, encoding="utf-8")
        _store(answer, part, start, total, say)
    note.unlink(missing_ok=True)
    return total


def _store(
    answer: http.client.HTTPResponse, part: Path, start: int, total: int | None, say: Callable[[str], None]
) -> None:
    began = said = time.monotonic()
    done = start
    with open(part, "r+b" if start else "wb") as file:
        file.seek(start)
        while block := answer.read1(BLOCK):
            file.write(block)
            done += len(block)
            if time.monotonic() - said >= 5.0:
                said = time.monotonic()
                speed = (done - start) / (said - began)
                left = f" of {total / 1e6:,.0f} MB, {(total - done) / speed:,.0f} s left" if total else " MB"
                say(f"{done / 1e6:,.0f}{left} ({speed / 1e6:.1f} MB/s)")
    if total is not None and done < total:
        raise http.client.IncompleteRead(b"", total - done)


def remember(path: Path) -> Wanted:
    """Note size and hash of a file beside it, or read the note that is there.

    Where nothing is published to check against, this at least tells a later download that differs from the first.
    """
    note = path.with_name(f"{path.name}.sha256.json")
    if note.exists():
        told = json.loads(note.read_text(encoding="utf-8"))
        return Wanted(told["bytes"], told["sha256"])
    if not path.exists():
        return Wanted()
    found = Wanted(path.stat().st_size, sha256(path))
    write_json(note, {"bytes": found.bytes, "sha256": found.sha256})
    return found
