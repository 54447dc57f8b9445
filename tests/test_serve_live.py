"""A server at its address: clients side by side, clients that go, places that run out, the end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import harness
import httpx2
import openai
import pytest
from conftest import configured
from served import SECONDS, Judge, Served, serving, settings
from test_scoring import TEXTS, model_of
from test_serve import refused

from gpt.config.derived import plain, replace_in
from gpt.config.rules import rule_problems
from gpt.inference import logprobs as inference_logprobs
from gpt.inference.server import address
from gpt.inference.server.app import CompletionsApp, ServerThread
from gpt.inference.server.request_queue import RequestQueue
from gpt.tasks.workers import serve


@contextmanager
def live(**more: Any) -> Iterator[tuple[Served, str]]:
    """A server at a free port, and its URL."""
    free = dataclasses.replace(settings()[0], port=0)
    with serving(**more) as served, contextlib.closing(address.bind(free)) as listener:
        front, url = ServerThread(served.service, listener), address.url(listener)
        try:
            yield served, url
        finally:
            front.close()


@contextmanager
def held(writer: Judge) -> Iterator[tuple[threading.Event, threading.Event]]:
    """The writer stops at the third token of every text: whether it is there, and what lets it go on."""
    there, go = threading.Event(), threading.Event()

    def before(number: int) -> None:
        if number == 2:
            there.set()
            assert go.wait(SECONDS)

    writer.before = before
    try:
        yield there, go
    finally:
        go.set()


def until(what: Callable[[], Any]) -> None:
    deadline = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ask(url: str, **body: Any) -> httpx2.Response:
    body = {"prompt": "abc", "max_tokens": 6, **body}
    return httpx2.post(f"{url}/v1/completions", json=body, timeout=SECONDS)


def raw(url: str, **body: Any) -> socket.socket:
    """A connection on which a request has been sent."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), SECONDS)
    content = json.dumps({"prompt": "abc", "max_tokens": 50, **body}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    connection.sendall(head.encode() + b"\r\n\r\n" + content)
    return connection


# --- clients ---


def test_the_client_of_openai_is_answered() -> None:
    with live(key="k") as (_, url), openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["parrot"]
        answer = client.completions.create(model="parrot", prompt=["ab", "xyz"], max_tokens=3, n=2, logprobs=1)
        assert [c.text for c in answer.choices] == ["aba", "bab", "xyz", "yzx"]
        assert answer.usage
        assert answer.usage.total_tokens == 5 + 12
        assert answer.choices[0].logprobs
        assert answer.choices[0].logprobs.tokens == ["a", "b", "a"]
        pieces = list(client.completions.create(model="parrot", prompt="ab", max_tokens=5, stream=True))
        assert "".join(piece.choices[0].text for piece in pieces) == "ababa"
        assert pieces[-1].choices[0].finish_reason == "length"
        extra = client.completions.create(model="parrot", prompt="ab", max_tokens=1, extra_body={"top_k": 3})
        assert extra.choices[0].text == "a"
        with pytest.raises(openai.BadRequestError, match=r"top_p=5\.0"):
            client.completions.create(model="parrot", prompt="ab", top_p=5)
        with pytest.raises(openai.NotFoundError, match='no "gpt-4" here'):
            client.completions.create(model="gpt-4", prompt="ab")


def test_two_clients_are_answered_one_after_the_other_and_health_at_once() -> None:
    with live() as (served, url), held(served.writer) as (there, go), ThreadPoolExecutor() as threads:
        first = threads.submit(ask, url, prompt="ab")
        assert there.wait(SECONDS)
        second = threads.submit(ask, url, prompt="xyz")
        until(lambda: served.desk.waiting == 1)
        health = httpx2.get(f"{url}/health").json()
        assert health == {"status": "ready", "model": "parrot", "running": 1, "waiting": 1}
        assert not first.done()
        go.set()
        texts = [asked.result(SECONDS).json()["choices"][0]["text"] for asked in (first, second)]
        assert texts == ["ababab", "xyzxyz"]
        assert [prompts for prompts, _ in served.writer.asked] == [[[97, 98]], [[120, 121, 122]]]


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_is_not_written_on_for_a_client_that_is_gone(stream: bool) -> None:
    with live() as (served, url), held(served.writer) as (there, go):
        connection = raw(url, stream=stream)
        assert there.wait(SECONDS)
        running = served.desk.running
        assert running
        connection.close()
        until(lambda: running.gone)
        go.set()
        until(lambda: served.desk.running is None)
        assert served.writer.written == 3  # of 50
        assert ask(url).json()["choices"][0]["text"] == "abcabc"


def test_a_client_that_goes_while_it_waits_gives_its_place_back() -> None:
    with live() as (served, url), held(served.writer) as (there, _):
        first = raw(url)
        assert there.wait(SECONDS)
        second = raw(url)
        until(lambda: served.desk.waiting == 1)
        second.close()
        until(lambda: served.desk.waiting == 0)
        first.close()
    assert len(served.writer.asked) == 1


def test_a_client_that_goes_before_it_has_said_all_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with live() as (served, url):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), SECONDS) as connection:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99"
            connection.sendall(head.encode() + b'\r\n\r\n{"prompt": ')
            until(lambda: served.desk.state == "ready")
        assert ask(url).status_code == 200
    assert [record for record in caplog.records if record.name.startswith("uvicorn") and record.levelno > 20] == []


def test_pieces_come_while_the_text_is_written() -> None:
    with live() as (served, url), held(served.writer) as (there, go):
        body = {"prompt": "abc", "max_tokens": 6, "stream": True}
        with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=SECONDS) as response:
            lines = response.iter_lines()
            assert '"text": "a"' in next(lines)
            assert next(lines) == ""
            assert '"text": "b"' in next(lines)
            assert there.is_set() or there.wait(SECONDS)
            go.set()
            assert [*lines][-2:] == ["data: [DONE]", ""]


def test_whoever_finds_no_place_is_told_to_come_back() -> None:
    limits = dataclasses.replace(settings()[0], queue=1)
    with live(limits=limits) as (served, url), held(served.writer) as (there, go), ThreadPoolExecutor() as threads:
        first = threads.submit(ask, url)
        assert there.wait(SECONDS)
        second = threads.submit(ask, url)
        until(lambda: served.desk.waiting == 1)
        third = ask(url)
        assert "1 requests wait already (serve.queue)" in refused(third, 503)["message"]
        assert int(third.headers["retry-after"]) > 0
        go.set()
        assert [asked.result(SECONDS).status_code for asked in (first, second)] == [200, 200]


def test_whoever_waits_too_long_is_told_so_and_gives_the_place_back() -> None:
    limits = dataclasses.replace(settings()[0], queue_seconds=0.05)
    with serving(limits=limits, work=False) as served:
        error = refused(served.post(), 504)
        assert error["message"].startswith("the request waited 0.05 s for its turn (serve.queue_seconds)")
        assert refused(served.post(stream=True), 504)
        assert served.desk.waiting == 0


def test_a_large_body_is_refused_so_that_the_client_can_read_it() -> None:
    with live() as (_, url):
        content, headers = b'{"prompt": "%s"}' % (b"a" * 20_000_000), {"Content-Type": "application/json"}
        with pytest.raises(urllib.error.HTTPError) as caught:  # this client sends all before it reads
            urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", content, headers))
        with caught.value as error:
            assert b"the body has more than 1048576 bytes (serve.max_body)" in error.read()
        assert ask(url).status_code == 200


# --- beginning and end ---


def test_until_the_model_is_there_the_server_says_that_it_is_loading() -> None:
    limits, generate = settings()
    desk = RequestQueue(limits.queue)
    service = CompletionsApp(limits, generate, "parrot", desk)
    with contextlib.closing(address.bind(dataclasses.replace(limits, port=0))) as listener:
        front, url = ServerThread(service, listener), address.url(listener)
        response = httpx2.get(f"{url}/health")
        assert (response.status_code, response.json()["status"]) == (503, "loading")
        assert "the server is loading" in refused(ask(url), 503)["message"]
        service.open(Judge())
        assert httpx2.get(f"{url}/health").status_code == 200
        front.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_running_request_finish_and_no_other_begin(number: signal.Signals) -> None:
    with live() as (served, url), held(served.writer) as (there, go), ThreadPoolExecutor() as threads:
        first = threads.submit(ask, url)
        assert there.wait(SECONDS)
        second = threads.submit(ask, url)
        until(lambda: served.desk.waiting == 1)
        served.heard.received = number
        go.set()
        assert first.result(SECONDS).json()["choices"][0]["text"] == "abcabc"
        assert "the server is closing" in refused(second.result(SECONDS), 503)["message"]
        assert "the server is closing" in refused(ask(url), 503)["message"]
        until(lambda: served.code is not None)
        assert served.code == 128 + number


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_would_take_long_is_cut_by_a_signal(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr(serve, "FINISH_SECONDS", 0.0)
    with live() as (served, url), held(served.writer) as (there, go), ThreadPoolExecutor() as threads:
        first = threads.submit(ask, url, stream=stream)
        assert there.wait(SECONDS)
        served.heard.received = signal.SIGTERM
        go.set()
        response = first.result(SECONDS)
        assert "the server is closing" in response.text
        assert response.status_code == (200 if stream else 503)
        assert "[DONE]" not in response.text
        assert served.writer.written < 6


@pytest.mark.slow
def test_all_ranks_write_the_same_stop_together_and_score_as_one_does(small: list[str]) -> None:
    wide = [*small, "model.init_std=0.3", "task=serve"]
    config = plain(configured([*wide, "parallel.mp_degree=2", "parallel.pp_degree=2"]))
    ranks = harness.run("ranks_serve:serve", 4, config, TEXTS)
    for cut in (False, True):
        for rank, served in enumerate(said["served"][cut] for said in ranks):
            assert served["written"] == ([5] if cut else [10, 5, 10])
            assert served["code"] == (143 if cut else 130)
            ends = ["UnavailableError"] * 3 if cut else ["Finished", "UnavailableError", "Finished"]
            assert [news for news in served["told"] if news != "Started"] == ([] if rank else ends)
    alone = inference_logprobs.score(model_of(configured(wide)), TEXTS)
    for said in ranks:
        for together, (logprobs, best, tops) in zip(alone, said["scores"], strict=True):
            assert logprobs == pytest.approx(together.logprobs, abs=1e-4)
            assert tops == pytest.approx(together.best_logprobs, abs=1e-4)
            assert best == together.best


# --- the address ---


def test_a_taken_port_is_one_sentence_before_anything_is_started() -> None:
    with contextlib.closing(address.bind(dataclasses.replace(settings()[0], port=0))) as listener:
        taken = dataclasses.replace(settings()[0], port=listener.getsockname()[1])
        (problem,) = address.problems(taken)
    place = f"serve.host=127.0.0.1 serve.port={taken.port}"
    assert (
        problem == f"{place}: another program listens there; choose another serve.port=..., or 0 for any that is free"
    )
    assert address.problems(taken) == []


def test_what_is_lacking_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    find = address.importlib.util.find_spec
    monkeypatch.setattr(address.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    bad = dataclasses.replace(settings()[0], host="no.such.host.invalid", api_key_env="NO_SUCH_KEY")
    packages, key, host = address.problems(bad)
    assert packages == "task=serve needs the packages uvicorn: pip install 'gpt-runner[serve]'"
    assert key == "serve.api_key_env=NO_SUCH_KEY: there is no such environment variable, or it is empty"
    assert host.startswith("serve.host=no.such.host.invalid serve.port=8000: no such host")


def test_the_address_is_loopback_unless_the_command_says_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclasses.dataclass
    class Job:
        config: Any

    for host, warns in (("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)):
        job = Job(configured(["task=serve", "serve.port=0", f"serve.host={host}"]))
        _, front, url = serve._open(job, RequestQueue(1))  # type: ignore[arg-type]
        front.close()
        assert (f"WARNING: serve.host={host}" in capsys.readouterr().out) is warns
        assert url.startswith("http://")


def test_copies_of_the_model_and_limits_out_of_range_are_refused() -> None:
    good = configured(["task=serve"])
    assert rule_problems(good) == []
    values = {"serve.port": 70000, "serve.queue": 0, "serve.max_tokens": 0, "parallel.dp_degree": 2}
    bad = replace_in(good, values)
    problems = "\n".join(rule_problems(bad))
    problems += "\n".join(rule_problems(replace_in(bad, {"serve.queue_seconds": 0})))
    for words in (
        "serve.queue_seconds=0: must be more",
        "serve.port=70000: at most 65535",
        "serve.queue=0: must be at least 1",
        "serve.max_tokens=0: must",
    ):
        assert words in problems
    assert "would make 2 copies of the model" in problems
    assert "parallel.dp_degree=2" in problems
