"""Downloads against a server on loopback that misbehaves in every way a server does."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from gpt.data import download
from gpt.data.download import Expected
from gpt.utils.errors import UserError
from scripts import download as script

CONTENT = np.random.default_rng(0).bytes(300_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
WHOLE = Expected(len(CONTENT), DIGEST)


@dataclass
class Server:
    """What is served, how it goes wrong, and what was asked for."""

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)  # bytes after which the next answers break off
    codes: list[int] = field(default_factory=list)  # answers of the next requests
    asked: list[str | None] = field(default_factory=list)
    after_cut: bytes | None = None  # what the file is after a break
    tell_length: bool = True
    address: str = ""


class Handler(BaseHTTPRequestHandler):
    state: Server

    def log_message(self, *_: object) -> None:
        """Silent."""

    def do_GET(self) -> None:
        state = self.state
        requested = self.headers.get("Range")
        state.asked.append(requested)
        content = state.files.get(self.path)
        if state.codes and (code := state.codes.pop(0)) != 200:
            self.send_error(code)
            return
        if content is None:
            self.send_error(404)
            return
        tag = f'"{hashlib.sha256(content).hexdigest()[:8]}"'
        start = int(requested.removeprefix("bytes=").removesuffix("-")) if requested and state.ranges else 0
        if self.headers.get("If-Range", tag) != tag:
            start = 0
        if start >= len(content) > 0:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if state.tell_length:
            self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", tag)
        self.end_headers()
        body = content[start:]
        self.wfile.write(body[: state.cuts.pop(0)] if state.cuts else body)
        state.files[self.path] = state.after_cut or content


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server(files={"/f": CONTENT})
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (Handler,), {"state": state}))
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.address = f"http://127.0.0.1:{httpd.server_address[1]}"
    yield state
    httpd.shutdown()
    httpd.server_close()
    thread.join()


Fetch = Callable[..., list[str]]


@pytest.fixture
def fetch(server: Server, tmp_path: Path) -> Fetch:
    def run(wanted: Expected = WHOLE, name: str = "f", tries: int = 3) -> list[str]:
        said: list[str] = []
        download.fetch(f"{server.address}/{name}", tmp_path / "f", wanted, said.append, tries=tries, pause=0.01)
        return said

    return run


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_arrives_and_is_not_fetched_twice(server: Server, fetch: Fetch, tmp_path: Path) -> None:
    fetch()
    fetch()
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert server.asked == [None]
    assert left(tmp_path) == ["f"]


def test_a_connection_cut_half_way_is_taken_up_where_it_broke(server: Server, fetch: Fetch, tmp_path: Path) -> None:
    server.cuts = [150_000, 100_000]
    said = fetch()
    assert server.asked == [None, "bytes=150000-", "bytes=250000-"]
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert "IncompleteRead" in said[0]
    assert "after 150,000 bytes; once more in" in said[0]


def test_a_download_that_fails_leaves_nothing_behind(server: Server, fetch: Fetch, tmp_path: Path) -> None:
    server.cuts = [200_000, 0, 0, 0, 0]
    with pytest.raises(UserError, match=r"IncompleteRead.*, 3 times in a row"):
        fetch()
    assert left(tmp_path) == []


def test_a_file_that_changed_meanwhile_is_fetched_whole(server: Server, fetch: Fetch, tmp_path: Path) -> None:
    server.cuts = [200_000]
    server.after_cut = CONTENT[::-1]
    fetch(Expected())
    assert (tmp_path / "f").read_bytes() == CONTENT[::-1]


def test_a_server_that_cannot_resume_sends_it_all_again(server: Server, fetch: Fetch, tmp_path: Path) -> None:
    server.ranges, server.cuts = False, [150_000]
    fetch()
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_server_that_is_busy_is_asked_again(server: Server, fetch: Fetch, tmp_path: Path) -> None:
    server.codes = [503, 429]
    assert len(fetch()) == 2
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_pauses_double(server: Server, fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("gpt.data.download.time.sleep", slept.append)
    server.codes = [500] * 9
    with pytest.raises(UserError, match="Internal Server Error, 4 times in a row"):
        fetch(tries=4)
    assert slept == [0.01, 0.02, 0.04]


@pytest.mark.parametrize("code", [403, 404])
def test_a_file_that_is_not_there_is_asked_for_once(server: Server, fetch: Fetch, tmp_path: Path, code: int) -> None:
    server.codes = [code]
    with pytest.raises(UserError, match=f"the server answers {code}"):
        fetch(name="missing")
    assert len(server.asked) == 1
    assert left(tmp_path) == []


@pytest.mark.parametrize("tell_length", [True, False])
def test_a_file_of_the_wrong_size_is_not_kept(server: Server, fetch: Fetch, tmp_path: Path, tell_length: bool) -> None:
    server.tell_length = tell_length
    with pytest.raises(UserError, match="not the file: it has 300,000 bytes instead of 300,001; nothing is kept"):
        fetch(Expected(300_001, None))
    assert left(tmp_path) == []


def test_a_file_with_another_hash_is_not_kept(fetch: Fetch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"its SHA-256 is {DIGEST} instead of 00"):
        fetch(Expected(None, "00"))
    assert left(tmp_path) == []


def test_a_file_that_is_there_is_never_written_over(fetch: Fetch, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("mine")
    with pytest.raises(UserError, match="is there already, but it has 4 bytes instead of 300,000: remove it"):
        fetch()
    assert (tmp_path / "f").read_text() == "mine"


def test_nobody_listening_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Connection refused, 2 times in a row"):
        download.fetch("http://127.0.0.1:9/f", tmp_path / "f", Expected(), print, tries=2, pause=0.01)


# --- the script ---


def test_the_sample_set_arrives_opens_and_later_changes_are_noticed(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "PAUSE_SECONDS", 0.01)
    ids = np.arange(100_000, dtype=np.uint16)
    np.save(tmp_path / "ids.npy", ids)
    np.savez(tmp_path / "idx.npz", lens=np.full(1000, 100, np.int32), docs=np.arange(1001, dtype=np.int64))
    for name in ("ids.npy", "idx.npz"):
        server.files[f"/gpt/gpt_en_dataset_300m_{name}"] = (tmp_path / name).read_bytes()
    server.cuts = [77_777]
    overrides = [f"address={server.address}/gpt/", f"folder={tmp_path}/data"]
    assert script.main(overrides) == 0
    assert "100,000 tokens in 1,000 documents" in capsys.readouterr().out
    assert script.main(overrides) == 0
    assert "there already" in capsys.readouterr().out

    path = tmp_path / "data" / "gpt_en_dataset_300m_ids.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert script.main(overrides) == 2
    assert "as noted when it was downloaded: remove it" in capsys.readouterr().err


def test_a_published_hash_can_be_put_into_the_configuration(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = f"files=[{{name: f, bytes: null, sha256: '{'0' * 64}'}}]"
    assert script.main([f"address={server.address}", f"folder={tmp_path}/data", wanted]) == 2
    assert "its SHA-256 is" in capsys.readouterr().err
    assert left(tmp_path / "data") == []


def test_an_unknown_key_of_the_script_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["adress=http://127.0.0.1:9"]) == 2
    assert "keys: address, folder, files" in capsys.readouterr().err
