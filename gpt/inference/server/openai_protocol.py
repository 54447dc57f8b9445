"""The bodies of OpenAI's ``/v1/completions``: requests, checked, and responses. No HTTP, no model.

Fields that OpenAI has not, with the meaning of ``gpt.config.task_schemas.Generate``: ``top_k``, ``min_tokens``,
``repetition_penalty``, ``num_beams``, ``length_penalty``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import secrets
import time
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, ValidationInfo

from gpt.config.rules import suggest
from gpt.config.sampling import Sampling
from gpt.config.task_schemas import Generate, Serve
from gpt.inference.server.request_queue import Finished, GenerationRequest
from gpt.inference.types import Completion, Scorer, TextDelta, TextGenerator, TokenLogprobs

Body = dict[str, Any]

# Settings of Sampling with another name in a request.
CALLED = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "num_return_sequences": "n"}
MAX_STOPS = 16
MAX_UNKNOWN = 5  # fields that a message names
STREAM_OPTIONS = 'stream_options: only {"include_usage": true}, and only with stream'
LARGE = 1e9  # no setting is sensible beyond, and a float is not exact


class ApiError(Exception):
    """An error response and its HTTP status."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> Body:
        """Return OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def called(setting: str) -> str:
    """Return the name in a request of a setting of ``Sampling``."""
    return CALLED.get(setting, setting)


def _prompts(value: Any) -> list[Any]:
    several = isinstance(value, list) and value and not _is_tokens(value)
    prompts: list[Any] = value if several else [value]
    if not all(_is_text(prompt) or _is_tokens(prompt) for prompt in prompts):
        raise ValueError("prompt: a text, a list of token numbers, or a list of such; none may be empty")
    return prompts


def _stops(value: Any) -> tuple[str, ...] | None:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return None
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(s == "" or _is_text(s) for s in stops):
        raise ValueError(f"stop: a text, or a list of at most {MAX_STOPS}")
    return tuple(stops)


def _stream_options(value: Any) -> bool:
    if not isinstance(value, dict | None) or not isinstance((value or {}).get("include_usage", False), bool):
        raise ValueError(STREAM_OPTIONS)
    return bool((value or {}).get("include_usage"))


def _without_effect(value: Any, info: ValidationInfo) -> None:
    """Accept only OpenAI's value that has no effect."""
    if value is not None and value not in (0, {}, ""):
        raise ValueError(f"{info.field_name} is not supported: leave it out")


Whole = Annotated[int | None, Field(description="a whole number")]
Real = Annotated[float | None, Field(gt=-LARGE, lt=LARGE, allow_inf_nan=False, description="a number")]
Flag = Annotated[bool | None, Field(description="true or false")]
Ignored = Annotated[None, PlainValidator(_without_effect)]


class CompletionFields(BaseModel):
    """The fields of a request; None: not given. Descriptions are parts of messages."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Any = None
    prompt: Annotated[list[Any], PlainValidator(_prompts)] = []
    stop: Annotated[tuple[str, ...] | None, PlainValidator(_stops)] = None
    stream: Flag = None
    stream_options: Annotated[bool, PlainValidator(_stream_options)] = False
    logprobs: Whole = None
    echo: Flag = None
    best_of: Whole = None
    user: Any = None
    max_tokens: Whole = None
    min_tokens: Whole = None
    top_k: Whole = None
    n: Whole = None
    num_beams: Whole = None
    seed: Whole = None
    temperature: Real = None
    top_p: Real = None
    repetition_penalty: Real = None
    length_penalty: Real = None
    frequency_penalty: Ignored = None
    presence_penalty: Ignored = None
    logit_bias: Ignored = None
    suffix: Ignored = None


class Problems:
    """Problems of a request: sentences, and the fields that they name."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.fields: set[str] = set()

    def add(self, sentence: str, field: str | None = None) -> None:
        """Add a sentence; without ``field`` its first word is the field."""
        self.sentences.append(sentence)
        self.fields.add(field or re.findall(r"\w+", sentence)[0])

    def read(self, body: Body) -> CompletionFields:
        """Return the fields; those with a problem as if they were not given."""
        names = list(CompletionFields.model_fields)
        for field in [field for field in body if field not in names][:MAX_UNKNOWN]:
            self.add(f"unknown field {_shown(field)}{suggest(field[:60], names)}", field[:60])
        known = {"prompt": None, **{field: value for field, value in body.items() if field in names}}
        try:
            return CompletionFields.model_validate(known)
        except ValidationError as error:
            for problem in error.errors():
                field, value = str(problem["loc"][0]), problem["input"]
                own = problem.get("ctx", {}).get("error")  # a ValueError of a validator
                self.add(
                    str(own or f"{field}: {CompletionFields.model_fields[field].description}, not {_shown(value)}")
                )
                known.pop(field, None)
            return CompletionFields.model_validate(known)


@dataclass(frozen=True)
class CompletionRequest:
    """A request that can be answered.

    Attributes:
        wish: for the model.
        echo: what each text begins with: its prompt, or nothing.
        top: whether the most probable tokens are wanted too, besides the log probabilities of the text's own.
    """

    wish: GenerationRequest
    echo: list[str]
    top: bool
    stream: bool
    usage: bool

    @property
    def per_prompt(self) -> int:
        """Texts of each prompt."""
        return self.wish.sampling.num_return_sequences if self.wish.sampling else 1


def parse(body: Any, model: str, defaults: Generate, settings: Serve, writer: TextGenerator) -> CompletionRequest:
    """Check a request, ``body`` being decoded JSON; raise an ``ApiError`` with all its problems."""
    if not isinstance(body, dict):
        raise ApiError(400, 'the body must be a JSON object, such as {"prompt": "import "}')
    if body.get("model") not in (None, model):
        message = f"model: there is no {_shown(body['model'])} here; this server has {model}"
        raise ApiError(404, message, param="model", code="model_not_found")
    problems = Problems()
    fields = problems.read(body)
    given = {f.name: getattr(fields, called(f.name)) for f in dataclasses.fields(Sampling)}
    sampling = Sampling.of(defaults, secrets.randbits(31))
    sampling = dataclasses.replace(sampling, **{name: value for name, value in given.items() if value is not None})
    scores_only = bool(fields.echo) and sampling.max_new_tokens == 0  # the prompt comes back with log probabilities
    prompts: list[list[int]] = []
    count, per_prompt = len(fields.prompt), max(sampling.num_return_sequences, sampling.num_beams)
    if count * per_prompt > settings.max_texts:
        limit = f"more than this server's {settings.max_texts} at once: send several requests"
        problems.add(f"{count} prompts x {per_prompt} texts are {limit}", "prompt")
    else:
        prompts = [writer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in fields.prompt]
    if stray := [token for row in prompts for token in row if not 0 <= token < writer.vocab]:
        problems.add(f"prompt: {stray[0]} is not a token; they are numbered from 0 to {writer.vocab - 1}")
    sampling = _fit(problems, fields, sampling, max(map(len, prompts), default=0), settings, writer)
    for sentence in sampling.problems(called) if not scores_only else ():
        problems.add(sentence)
    logprobs, stream = fields.logprobs, bool(fields.stream)
    if logprobs not in (None, 0, 1):
        problems.add(f"logprobs={logprobs}: 0 (of the text's tokens) or 1 (of the most probable ones too)")
    if stream and logprobs is not None:
        problems.add("logprobs does not go with stream: they are known when the text is complete")
    if fields.best_of not in (None, sampling.num_return_sequences, sampling.num_beams):
        problems.add(f"best_of={fields.best_of}: only with as many num_beams, of which the n best come back")
    if body.get("stream_options") is not None and not stream and "stream_options" not in problems.fields:
        problems.add(STREAM_OPTIONS)
    if problems.sentences:
        param = problems.fields.pop() if len(problems.fields) == 1 else None
        raise ApiError(400, "; ".join(problems.sentences), param=param)
    if logprobs is not None and not isinstance(writer, Scorer):
        raise ApiError(501, "logprobs: this model cannot be asked for log probabilities", param="logprobs")
    wish = GenerationRequest(prompts, None if scores_only else sampling, scores=logprobs is not None, pieces=stream)
    echo = [(p if isinstance(p, str) else writer.decode(p)) if fields.echo else "" for p in fields.prompt]
    return CompletionRequest(wish, echo, logprobs == 1, stream, fields.stream_options)


def _fit(
    problems: Problems,
    fields: CompletionFields,
    sampling: Sampling,
    longest: int,
    settings: Serve,
    writer: TextGenerator,
) -> Sampling:
    """Return the sampling with as many new tokens as there is room for, unless the request gives a number."""
    room = writer.positions - longest
    most = min(room, settings.max_tokens or room)
    if fields.max_tokens is None and most > 0:
        new = min(sampling.max_new_tokens, most)
        least = min(sampling.min_new_tokens, new) if fields.min_tokens is None else sampling.min_new_tokens
        return dataclasses.replace(sampling, max_new_tokens=new, min_new_tokens=least)
    if room < min(1, sampling.max_new_tokens):
        positions = f"the model's {writer.positions} positions"
        problems.add(f"prompt: its {longest} tokens leave no room in {positions}; shorten it")
    elif sampling.max_new_tokens > most:
        why = f"the model has {writer.positions} positions, of which the prompt takes {longest}"
        if most < room:
            why = "as many as this server allows (serve.max_tokens)"
        problems.add(f"max_tokens={sampling.max_new_tokens}: at most {most}; {why}")
    return sampling


class ResponseBuilder:
    """Builds the response bodies of one request; they share its id and time."""

    def __init__(self, request: CompletionRequest, model: str, writer: TextGenerator) -> None:
        self._request = request
        self._writer = writer
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, done: Finished) -> Body:
        """Return all texts at once."""
        choices = []
        for prompt, texts in enumerate(done.texts):
            for sequence, text in enumerate(texts):
                scored = done.scored[prompt][sequence] if done.scored else None
                logprobs = self._logprobs(self._request.wish.prompts[prompt], text, scored) if scored else None
                choice = self._choice(prompt, sequence, self._request.echo[prompt] + text.text, text.finish)
                choices.append({**choice, "logprobs": logprobs})
        return {**self._head, "choices": choices, "usage": self._usage(done)}

    def first(self) -> list[Body]:
        """Return the first chunks of a stream: prompts that are echoed."""
        each, finish = range(self._request.per_prompt), None if self._request.wish.sampling else "length"
        echoes = [(prompt, text) for prompt, text in enumerate(self._request.echo) if text]
        return [self._chunk(self._choice(prompt, number, text, finish)) for prompt, text in echoes for number in each]

    def piece(self, piece: TextDelta) -> Body:
        """Return the chunk of a part of a text."""
        return self._chunk(self._choice(piece.prompt, piece.sequence, piece.text, piece.finish))

    def last(self, done: Finished) -> list[Body]:
        """Return the last chunk of a stream, the count of tokens, if it is wanted."""
        return [{**self._head, "choices": [], "usage": self._usage(done)}] if self._request.usage else []

    def _chunk(self, choice: Body) -> Body:
        return {**self._head, "choices": [choice], **({"usage": None} if self._request.usage else {})}

    def _choice(self, prompt: int, sequence: int, text: str, finish: str | None) -> Body:
        index = prompt * self._request.per_prompt + sequence
        return {"text": text, "index": index, "logprobs": None, "finish_reason": finish}

    def _usage(self, done: Finished) -> Body:
        read = sum(map(len, self._request.wish.prompts))
        new = sum(len(text.tokens) for texts in done.texts for text in texts)
        return {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}

    def _logprobs(self, prompt: list[int], text: Completion, scored: TokenLogprobs) -> Body:
        """Return log probabilities of the text, after those of an echoed prompt, whose first token has none."""
        skipped = 0 if self._request.echo[0] else len(prompt)
        tokens = (prompt + text.tokens)[skipped:]
        values: list[float | None] = [None, *scored.logprobs][skipped:]
        words = [self._writer.decode([token]) for token in tokens]
        tops: list[Body | None] = [None] * len(tokens)
        for i, value in enumerate(values):
            if value is not None and self._request.top:
                best = skipped + i - 1
                tops[i] = {words[i]: value, self._writer.decode([scored.best[best]]): scored.best_logprobs[best]}
        return {
            "tokens": words,
            "token_logprobs": values,
            "top_logprobs": tops if self._request.top else None,
            "text_offset": [0, *itertools.accumulate(map(len, words))][: len(words)],
        }


def _is_text(value: Any) -> bool:
    """Return whether it is text that can be encoded: JSON can hold halves of characters."""
    try:
        return isinstance(value, str) and bool(value.encode())
    except UnicodeError:
        return False


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _shown(value: Any) -> str:
    """Return a client's value, cut to fit in a sentence."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
