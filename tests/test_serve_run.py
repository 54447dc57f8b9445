"""The whole command: a trained run is served, asked by several clients, and ended."""

from __future__ import annotations

import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from conftest import metrics
from test_run import Run, started

from scripts.kill_test import workers_of

pytestmark = pytest.mark.slow


def test_a_run_is_served_until_a_signal_comes(
    gpt: Run, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_OF_TEST", "a-secret")
    command = ["task=serve", f"checkpoint={whole}", "serve.api_key_env=KEY_OF_TEST", "cluster.device=cpu"]
    with started(tmp_path, *command, "serve.port=0") as server:
        assert server.stdout
        lines: list[str] = []
        while not lines or not lines[-1].startswith("ready: "):
            lines.append(server.stdout.readline())
            assert lines[-1], "".join(lines)
        url, name = re.findall(r"ready: (\S+) has the model (\S+);", lines[-1])[0]
        client = openai.OpenAI(base_url=url, api_key="a-secret", max_retries=0)
        assert [model.id for model in client.models.list()] == [name]

        def greedy(prompt: str) -> str:
            answer = client.completions.create(model=name, prompt=prompt, max_tokens=12, temperature=0)
            assert answer.usage
            assert answer.usage.completion_tokens == 12 or answer.choices[0].finish_reason == "stop"
            return answer.choices[0].text

        with ThreadPoolExecutor(2) as clients:
            both = list(clients.map(greedy, ["Return the ", "The "]))
        assert both == [greedy("Return the "), greedy("The ")]

        pieces = client.completions.create(model=name, prompt="The ", max_tokens=12, temperature=0, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == both[1]

        scored = client.completions.create(
            model=name, prompt="Return the list", max_tokens=0, logprobs=1, extra_body={"echo": True}
        ).choices[0]
        assert scored.logprobs
        assert scored.logprobs.token_logprobs
        first, *rest = scored.logprobs.token_logprobs
        assert first is None
        assert all(-20 < value < 0 for value in rest)
        mean = -sum(rest) / len(rest)
        assert mean == pytest.approx(metrics(whole)[-1]["val/loss"], abs=2.0)  # it is that model, not another one

        with pytest.raises(openai.BadRequestError, match="max_tokens=99: at most"):
            client.completions.create(model=name, prompt="The ", max_tokens=99)
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="another").models.list()

        port = url.removesuffix("/v1").rsplit(":", 1)[1]
        second = gpt(*command, f"serve.port={port}")
        assert second.code == 2
        assert f"serve.host=127.0.0.1 serve.port={port}: another program listens there" in second.err

        assert "a-secret" not in (whole / "logs" / "serve.json").read_text()
        server.send_signal(signal.SIGTERM)
        rest_of_it = server.communicate(timeout=60)[0]
    assert server.returncode == 143, rest_of_it
    assert "stopped by SIGTERM" in rest_of_it
    assert "Traceback" not in rest_of_it
    assert workers_of(whole) == []
