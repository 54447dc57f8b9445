"""Completions over HTTP: what is asked, what comes back, what is refused. The model is a parrot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
from served import Judge, Parrot, Served, serving, settings


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as served:
        yield served


def refused(response: Any, status: int) -> dict[str, Any]:
    """The error, which must be one as OpenAI has them."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    return dict(error)


def events(response: Any) -> list[Any]:
    """Objects of a stream, which must end as OpenAI's do."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


# --- what comes back ---


def test_an_answer_has_what_openai_has(served: Served) -> None:
    body = served.post(model="parrot").json()
    assert body["id"].startswith("cmpl-")
    assert body["created"] > 1e9
    assert {k: body[k] for k in body if k not in ("id", "created")} == {
        "object": "text_completion",
        "model": "parrot",
        "choices": [{"text": "abcabc", "index": 0, "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9},
    }


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [("ab", ["aba"]), (["ab", "xyz"], ["aba", "xyz"]), ([97, 98], ["aba"]), ([[97], [120, 121]], ["aaa", "xyx"])],
)
def test_a_prompt_is_text_or_tokens_one_or_several(served: Served, prompt: Any, texts: list[str]) -> None:
    choices = served.choices(prompt=prompt, max_tokens=3)
    assert [(c["index"], c["text"]) for c in choices] == list(enumerate(texts))


def test_n_texts_of_each_prompt_are_numbered_through(served: Served) -> None:
    choices = served.choices(prompt=["ab", "xyz"], max_tokens=3, n=2, best_of=2)
    assert [(c["index"], c["text"]) for c in choices] == [(0, "aba"), (1, "bab"), (2, "xyz"), (3, "yzx")]


def test_every_setting_reaches_the_model(served: Served) -> None:
    said = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "n": 2, "stop": ["x", "y"], "seed": 11, "min_tokens": 2,
        "repetition_penalty": 1.5, "num_beams": 3, "length_penalty": 2,
    }  # fmt: skip
    served.choices(**said, best_of=3, user="me", presence_penalty=0, logit_bias={})
    sampling = served.writer.asked[-1][1]
    assert dataclasses.asdict(sampling) == {
        "max_new_tokens": 6, "min_new_tokens": 2, "temperature": 0.5, "top_k": 7, "top_p": 0.9,
        "repetition_penalty": 1.5, "stop": ("x", "y"), "num_return_sequences": 2, "num_beams": 3,
        "length_penalty": 2.0, "seed": 11,
    }  # fmt: skip


def test_what_a_request_does_not_say_the_command_says_and_a_seed_is_drawn(served: Served) -> None:
    seeds = set()
    for _ in range(3):
        served.client.post("/v1/completions", json={"prompt": "ab", "temperature": None})
        sampling = served.writer.asked[-1][1]
        seeds.add(sampling.seed)
        assert (sampling.temperature, sampling.top_k, sampling.num_return_sequences) == (0.8, 50, 1)
        assert sampling.max_new_tokens == 64 - 2  # of generate.max_new_tokens=120 as many as there is room for
    assert len(seeds) > 1


@pytest.mark.parametrize("more", [{}, {"n": 2, "prompt": ["ab", "xyz"]}, {"echo": True}, {"num_beams": 2}])
def test_a_stream_has_the_same_texts(served: Served, more: dict[str, Any]) -> None:
    whole = {c["index"]: (c["text"], c["finish_reason"]) for c in served.choices(**more)}
    texts, ends = dict.fromkeys(whole, ""), {}
    chunks = events(served.post(**more, stream=True))
    assert len(chunks) > len(whole) * 3 or "num_beams" in more  # beams come whole
    for chunk in chunks:
        assert chunk["object"] == "text_completion"
        assert "usage" not in chunk
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            ends[choice["index"]] = choice["finish_reason"]
    assert {i: (texts[i], ends[i]) for i in whole} == whole


def test_a_stream_ends_with_the_count_of_tokens_if_it_is_wanted(served: Served) -> None:
    *pieces, last = events(served.post(stream=True, stream_options={"include_usage": True}))
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
    assert all(piece["usage"] is None for piece in pieces)


# --- log probabilities ---


def test_log_probabilities_of_the_text(served: Served) -> None:
    (choice,) = served.choices(max_tokens=2, logprobs=0)
    assert choice["logprobs"] == {
        "tokens": ["a", "b"], "token_logprobs": [-0.97, -0.98], "top_logprobs": None, "text_offset": [0, 1]
    }  # fmt: skip
    (choice,) = served.choices(max_tokens=2, logprobs=1)
    assert choice["logprobs"]["top_logprobs"] == [{"a": -0.97, "`": -0.96}, {"b": -0.98}]


def test_a_prompt_is_scored_without_writing_anything(served: Served) -> None:
    asked = len(served.writer.asked)
    choices = served.choices(prompt=["abc", "bb"], max_tokens=0, echo=True, logprobs=1)
    assert len(served.writer.asked) == asked
    assert [c["text"] for c in choices] == ["abc", "bb"]
    assert [c["finish_reason"] for c in choices] == ["length", "length"]
    first, second = (c["logprobs"] for c in choices)
    assert first["token_logprobs"] == [None, -0.98, -0.99]
    assert first["top_logprobs"] == [None, {"b": -0.98}, {"c": -0.99, "b": -0.98}]
    assert second["token_logprobs"] == [None, -0.98]
    assert [c["text"] for c in served.choices(prompt=[97, 98], max_tokens=0, echo=True)] == ["ab"]


@pytest.mark.parametrize(("rest", "greedy"), [([98, 100], True), ([98, 99], False)])
def test_the_harness_of_eleutherai_reads_scores_as_it_asks_for_them(
    served: Served, rest: list[int], greedy: bool
) -> None:
    """As lm-eval's local-completions: one token is asked for and cut off, the best token by the largest number."""
    context = [97, 98, 99]
    body = {"model": "parrot", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    (choice,) = served.choices(prompt=context + rest, **body)
    logprobs = choice["logprobs"]["token_logprobs"][len(context) : -1]
    tops = choice["logprobs"]["top_logprobs"][len(context) : -1]
    assert logprobs == [-t / 100 for t in rest]
    assert all(value == max(top.values()) for value, top in zip(logprobs, tops, strict=True)) is greedy


def test_a_model_that_cannot_score_says_so() -> None:
    with serving(Parrot()) as served:
        assert "cannot be asked for log probabilities" in refused(served.post(logprobs=1), 501)["message"]
        assert served.choices()[0]["text"] == "abcabc"


# --- what is refused ---

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "temperature below zero": ({"temperature": -1}, "temperature=-1.0: must be at least 0"),
    "temperature too large for a float": ({"temperature": 10**400}, "temperature: a number, not 1000"),
    "top_p": ({"top_p": 0}, "top_p=0.0: from more than 0 up to 1"),
    "repetition_penalty": ({"repetition_penalty": 1e-9}, "repetition_penalty=1e-09: from 0.01 to 100"),
    "length_penalty": ({"length_penalty": -400}, "length_penalty=-400.0: from -10 to 10"),
    "no tokens": ({"max_tokens": 0}, "max_tokens=0: must be at least 1"),
    "more tokens than positions": ({"max_tokens": 62}, "max_tokens=62: at most 61; the model has 64 positions"),
    "a long prompt": ({"prompt": "a" * 64}, "prompt: its 64 tokens leave no room in the model's 64 positions"),
    "a longer prompt scored": (
        {"prompt": "a" * 65, "max_tokens": 0, "echo": True},
        "prompt: its 65 tokens leave no room",
    ),
    "half a number": ({"max_tokens": 1.5}, "max_tokens: a whole number, not 1.5"),
    "a truth as a number": ({"n": True}, "n: a whole number, not true"),
    "n": ({"n": 0}, "n=0: must be at least 1"),
    "too many texts": ({"n": 17}, "1 prompts x 17 texts are more than this server's 16 at once"),
    "too many prompts": ({"prompt": ["a"] * 17}, "17 prompts x 1 texts are more than this server's 16 at once"),
    "more than beams": ({"num_beams": 2, "n": 3}, "n=3 is more than num_beams=2"),
    "best_of": ({"best_of": 4}, "best_of=4: only with as many num_beams"),
    "min_tokens": ({"min_tokens": 7}, "min_tokens=7 is more than max_tokens=6"),
    "an empty prompt": ({"prompt": ""}, "prompt: a text, a list of token numbers"),
    "an empty list": ({"prompt": []}, "prompt: a text, a list of token numbers"),
    "one empty of several": ({"prompt": ["a", ""]}, "prompt: a text, a list of token numbers"),
    "a mixture": ({"prompt": ["a", [1]], "max_tokens": 1, "stop": "a", "n": 0}, "n=0: must be"),
    "a number": ({"prompt": 3}, "prompt: a text, a list of token numbers"),
    "no prompt": ({"prompt": None}, "prompt: a text, a list of token numbers"),
    "half a character": ({"prompt": "a\ud800"}, "prompt: a text, a list of token numbers"),
    "a token that is none": ({"prompt": [97, 256]}, "prompt: 256 is not a token; they are numbered from 0 to 255"),
    "an empty stop": ({"stop": ["a", ""]}, "stop has an empty string"),
    "a stop that is no text": ({"stop": [3]}, "stop: a text, or a list of at most 16"),
    "many stops": ({"stop": list("abcdefghijklmnopq")}, "stop: a text, or a list of at most 16"),
    "logprobs": ({"logprobs": 5}, "logprobs=5: 0 (of the text's tokens) or 1"),
    "a stream of logprobs": ({"logprobs": 0, "stream": True}, "logprobs does not go with stream"),
    "stream_options": ({"stream_options": {"include_usage": True}}, "only with stream"),
    "a word for a truth": ({"stream": "yes"}, 'stream: true or false, not "yes"'),
    "a penalty": ({"presence_penalty": 0.5}, "presence_penalty is not supported"),
    "another penalty": ({"frequency_penalty": -1}, "frequency_penalty is not supported"),
    "a bias": ({"logit_bias": {"5": 1}}, "logit_bias is not supported"),
    "a suffix": ({"suffix": "end"}, "suffix is not supported"),
    "a typo": ({"temperatur": 1}, 'unknown field "temperatur" (did you mean temperature?)'),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_told_why(served: Served, case: str) -> None:
    body, words = BAD[case]
    asked = len(served.writer.asked)
    response = served.client.post(
        "/v1/completions",
        content=json.dumps({"prompt": "abc", "max_tokens": 6, **body}),
        headers={"Content-Type": "application/json"},
    )
    error = refused(response, 400)
    assert words in error["message"]
    assert len(error["message"]) < 400
    assert len(served.writer.asked) == asked


def test_every_problem_is_told_at_once_and_one_names_its_field(served: Served) -> None:
    error = refused(served.post(prompt="", max_tokens=99, top_p=2, n="two", typo=1, suffix="x", logprobs=3), 400)
    for words in ("prompt:", "max_tokens=99", "top_p=2.0", 'n: a whole number, not "two"', '"typo"', "suffix", "=3"):
        assert words in error["message"]
    assert error["param"] is None
    assert refused(served.post(top_p=2), 400)["param"] == "top_p"


def test_a_message_stays_short_whatever_is_sent(served: Served) -> None:
    error = refused(served.post(**{f"{i}{'x' * 99}": 0 for i in range(999)}), 400)
    assert len(error["message"]) < 500


def test_another_model_is_not_here(served: Served) -> None:
    error = refused(served.post(model="gpt-4"), 404)
    assert error["code"] == "model_not_found"
    assert error["message"] == 'model: there is no "gpt-4" here; this server has parrot'
    assert refused(served.client.get("/v1/models/gpt-4"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", '"x"', '{"prompt": "a\xff', "[" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(served: Served, content: str) -> None:
    headers = {"Content-Type": "application/json"}
    error = refused(served.client.post("/v1/completions", content=content.encode("latin-1"), headers=headers), 400)
    assert "JSON" in error["message"]


def test_what_is_not_there_says_what_is(served: Served) -> None:
    missing = served.client.post("/v1/chat/completions", json={})
    assert "POST /v1/completions" in refused(missing, 404)["message"]
    slash = served.client.post("/v1/completions/", json={"prompt": "a"}, follow_redirects=False)
    assert "not found" in refused(slash, 404)["message"]
    wrong = served.client.get("/v1/completions")
    assert "method not allowed: GET /v1/completions" in refused(wrong, 405)["message"]
    assert wrong.headers["allow"] == "POST"
    form = served.client.post("/v1/completions", data={"prompt": "a"})
    assert "application/json" in refused(form, 415)["message"]


def test_a_body_too_large_is_refused_in_bytes() -> None:
    limits = dataclasses.replace(settings()[0], max_body=100)
    with serving(limits=limits) as served:
        assert served.choices(prompt="a" * 10)
        error = refused(served.post(prompt="a" * 100), 413)
        assert error["message"] == "the body has more than 100 bytes (serve.max_body)"


def test_the_server_can_allow_fewer_tokens_than_the_model() -> None:
    limits = dataclasses.replace(settings()[0], max_tokens=5)
    with serving(limits=limits) as served:
        assert "max_tokens=6: at most 5; as many as this server allows" in refused(served.post(), 400)["message"]
        assert served.choices(max_tokens=None)[0]["text"] == "abcab"


def test_only_who_has_the_key_may_ask() -> None:
    with serving(key="sécret") as served:
        for headers in ({}, {"Authorization": "Bearer secret"}, {"Authorization": ""}):
            for response in (
                served.client.post("/v1/completions", json={"prompt": "a"}, headers=headers),
                served.client.get("/v1/models", headers=headers),
            ):
                assert refused(response, 401)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        headers = {"Authorization": "Bearer sécret".encode()}
        assert served.client.get("/v1/models", headers=headers).status_code == 200
        assert served.client.get("/health").status_code == 200
    assert served.writer.asked == []


def test_the_model_is_listed(served: Served) -> None:
    listed = served.client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["parrot"]
    assert served.client.get("/v1/models/parrot").json() == listed["data"][0]


def test_a_failure_of_the_model_is_told_and_the_next_request_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(number: int) -> None:
        raise MemoryError("no room for the cache")

    with serving(Judge()) as served:
        served.writer.before = fails
        assert "its log says why" in refused(served.post(), 500)["message"]
        broken = served.post(stream=True).text.split("\n\n")
        assert json.loads(broken[-2].removeprefix("data: "))["error"]["type"] == "server_error"
        served.writer.before = lambda number: None
        assert served.choices()[0]["text"] == "abcabc"
    assert "no room for the cache" in capsys.readouterr().err
