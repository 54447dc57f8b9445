"""What OpenAI's clients send to ``/v1/completions``, checked, and what they expect back. No HTTP, no model.

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
from typing import Any

from gpt.config.rules import suggest
from gpt.config.sampling import Sampling
from gpt.config.task_schemas import Generate, Serve
from gpt.inference.server.request_queue import Finished, GenerationRequest
from gpt.inference.types import Completion, Scorer, TextDelta, TextGenerator, TokenLogprobs

Body = dict[str, Any]

# How a setting of Sampling is called in a request, where that is not its own name.
CALLED = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "num_return_sequences": "n"}
WHOLE = ("max_new_tokens", "min_new_tokens", "top_k", "num_return_sequences", "num_beams", "seed")
REAL = ("temperature", "top_p", "repetition_penalty", "length_penalty")
OTHERS = ("model", "prompt", "stop", "stream", "stream_options", "logprobs", "echo", "best_of", "user")
# OpenAI's, taken only with the value that does nothing.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "suffix": ("",)
}  # fmt: skip
MOST_STOPS = 16
MOST_UNKNOWN = 5  # fields that a message names
LARGE = 1e9  # no setting is sensible beyond, and a float is not exact


class ApiError(Exception):
    """What a client is told instead of an answer, with the HTTP status."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> Body:
        """As OpenAI has it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def called(setting: str) -> str:
    """Name in a request of a setting of ``Sampling``."""
    return CALLED.get(setting, setting)


FIELDS = [*OTHERS, *(called(name) for name in (*WHOLE, *REAL)), *WITHOUT_EFFECT]


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


class _Reader:
    """Takes values of the right type out of a body; what is wrong is noted under the name of its field."""

    def __init__(self, body: Body) -> None:
        self._body = body
        self.problems: list[tuple[str, str]] = []

    def says(self, field: str) -> bool:
        return self._body.get(field) is not None

    def wrong(self, field: str, sentence: str) -> None:
        self.problems.append((field, sentence))

    def fields(self) -> None:
        """Note those that are unknown, or would have an effect that is not supported."""
        for field in [field for field in self._body if field not in FIELDS][:MOST_UNKNOWN]:
            self.wrong(field[:60], f"unknown field {_shown(field)}{suggest(field[:60], FIELDS)}")
        for field, harmless in WITHOUT_EFFECT.items():
            if self.says(field) and self._body[field] not in harmless:
                self.wrong(field, f"{field} is not supported: leave it out")

    def whole(self, field: str, default: int | None) -> Any:
        value = self._body.get(field, default)
        if value is None or type(value) is int:
            return default if value is None else value
        self.wrong(field, f"{field}: a whole number, not {_shown(value)}")
        return default

    def real(self, field: str, default: float) -> float:
        value = self._body.get(field, default)
        if value is None or (type(value) in (int, float) and abs(value) < LARGE):
            return default if value is None else float(value)
        self.wrong(field, f"{field}: a number, not {_shown(value)}")
        return default

    def flag(self, field: str) -> bool:
        value = self._body.get(field)
        if value is None or isinstance(value, bool):
            return bool(value)
        self.wrong(field, f"{field}: true or false, not {_shown(value)}")
        return False

    def stop(self, default: tuple[str, ...]) -> tuple[str, ...]:
        value = self._body.get("stop")
        texts = list(default) if value is None else [value] if isinstance(value, str) else value
        if isinstance(texts, list) and len(texts) <= MOST_STOPS and all(t == "" or _is_text(t) for t in texts):
            return tuple(texts)
        self.wrong("stop", f"stop: a text, or a list of at most {MOST_STOPS}")
        return ()

    def prompts(self) -> list[Any]:
        """Texts, or lists of token numbers."""
        value = self._body.get("prompt")
        several = isinstance(value, list) and value and not _is_tokens(value)
        found = value if several and isinstance(value, list) else [value]
        if all(_is_text(one) or _is_tokens(one) for one in found):
            return found
        self.wrong("prompt", "prompt: a text, a list of token numbers, or a list of such; none may be empty")
        return []

    def usage(self, stream: bool) -> bool:
        """Whether a stream ends with the count of tokens."""
        options = self._body.get("stream_options")
        if options is None:
            return False
        if stream and isinstance(options, dict) and isinstance(options.get("include_usage", False), bool):
            return bool(options.get("include_usage"))
        self.wrong("stream_options", 'stream_options: only {"include_usage": true}, and only with stream')
        return False


def parse(body: Any, model: str, defaults: Generate, settings: Serve, writer: TextGenerator) -> CompletionRequest:
    """Check a request.

    Args:
        body: decoded JSON.
        model: what the model is called.
        defaults: of what the request does not say.
        settings: hold the limits.
        writer: counts tokens.

    Raises:
        ApiError: with every problem of the request.
    """
    if not isinstance(body, dict):
        raise ApiError(400, 'the body must be a JSON object, such as {"prompt": "import "}')
    if body.get("model") not in (None, model):
        message = f"model: there is no {_shown(body['model'])} here; this server has {model}"
        raise ApiError(404, message, param="model", code="model_not_found")
    read = _Reader(body)
    read.fields()
    stream, echo, logprobs = read.flag("stream"), read.flag("echo"), read.whole("logprobs", None)
    sampling = _sampling(read, defaults)
    silent = echo and sampling.max_new_tokens == 0  # the prompt comes back, with its log probabilities
    given = read.prompts()
    prompts = _encoded(read, given, max(sampling.num_return_sequences, sampling.num_beams), settings, writer)
    sampling = _fitted(read, sampling, max(map(len, prompts), default=0), settings, writer)
    for sentence in sampling.problems(called) if not silent else ():
        read.wrong(re.findall(r"\w+", sentence)[0], sentence)
    if logprobs not in (None, 0, 1):
        read.wrong("logprobs", f"logprobs={logprobs}: 0 (of the text's tokens) or 1 (of the most probable ones too)")
    if stream and logprobs is not None:
        read.wrong("logprobs", "logprobs does not go with stream: they are known when the text is complete")
    best_of = read.whole("best_of", sampling.num_return_sequences)
    if best_of not in (sampling.num_return_sequences, sampling.num_beams):
        read.wrong("best_of", f"best_of={best_of}: only with as many num_beams, of which the n best come back")
    usage = read.usage(stream)
    if read.problems:
        params = {param for param, _ in read.problems}
        param = params.pop() if len(params) == 1 else None
        raise ApiError(400, "; ".join(sentence for _, sentence in read.problems), param=param)
    if logprobs is not None and not isinstance(writer, Scorer):
        raise ApiError(501, "logprobs: this model cannot be asked for log probabilities", param="logprobs")
    wish = GenerationRequest(prompts, None if silent else sampling, scores=logprobs is not None, pieces=stream)
    texts = [(one if isinstance(one, str) else writer.decode(one)) if echo else "" for one in given]
    return CompletionRequest(wish, texts, logprobs == 1, stream, usage)


def _sampling(read: _Reader, defaults: Generate) -> Sampling:
    """What the request says, and of the rest the defaults; a seed that is not given is drawn."""
    sampling = Sampling.of(defaults, secrets.randbits(31))
    said: Body = {name: read.whole(called(name), getattr(sampling, name)) for name in WHOLE}
    said |= {name: read.real(name, getattr(sampling, name)) for name in REAL}
    return dataclasses.replace(sampling, **said, stop=read.stop(sampling.stop))


def _encoded(read: _Reader, prompts: list[Any], each: int, settings: Serve, writer: TextGenerator) -> list[list[int]]:
    """Token numbers of prompts that the model can take."""
    if len(prompts) * each > settings.max_texts:
        sentence = f"{len(prompts)} prompts x {each} texts are more than this server's {settings.max_texts} at once"
        read.wrong("prompt", f"{sentence}: send several requests")
        return []
    rows = [writer.encode(one) if isinstance(one, str) else one for one in prompts]
    stray = [token for row in rows for token in row if not 0 <= token < writer.vocab]
    if stray:
        read.wrong("prompt", f"prompt: {stray[0]} is not a token; they are numbered from 0 to {writer.vocab - 1}")
    return rows


def _fitted(read: _Reader, sampling: Sampling, longest: int, settings: Serve, writer: TextGenerator) -> Sampling:
    """With as many new tokens as there is room for, unless the request says how many."""
    room = writer.positions - longest
    most = min(room, settings.max_tokens or room)
    if not read.says("max_tokens") and most > 0:
        new = min(sampling.max_new_tokens, most)
        least = sampling.min_new_tokens if read.says("min_tokens") else min(sampling.min_new_tokens, new)
        return dataclasses.replace(sampling, max_new_tokens=new, min_new_tokens=least)
    if room < min(1, sampling.max_new_tokens):
        sentence = f"prompt: its {longest} tokens leave no room in the model's {writer.positions} positions"
        read.wrong("prompt", f"{sentence}; shorten it")
    elif sampling.max_new_tokens > most:
        why = f"the model has {writer.positions} positions, of which the prompt takes {longest}"
        if most < room:
            why = "as many as this server allows (serve.max_tokens)"
        read.wrong("max_tokens", f"max_tokens={sampling.max_new_tokens}: at most {most}; {why}")
    return sampling


class ResponseBuilder:
    """The bodies that answer one request; they share its name and time."""

    def __init__(self, asked: CompletionRequest, model: str, writer: TextGenerator) -> None:
        self._asked = asked
        self._writer = writer
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, done: Finished) -> Body:
        """All texts at once."""
        choices = []
        for prompt, texts in enumerate(done.texts):
            for sequence, text in enumerate(texts):
                scored = done.scored[prompt][sequence] if done.scored else None
                logprobs = self._logprobs(self._asked.wish.prompts[prompt], text, scored) if scored else None
                choice = self._choice(prompt, sequence, self._asked.echo[prompt] + text.text, text.finish)
                choices.append({**choice, "logprobs": logprobs})
        return {**self._head, "choices": choices, "usage": self._usage(done)}

    def first(self) -> list[Body]:
        """What a stream begins with: prompts that are wanted back."""
        each, finish = range(self._asked.per_prompt), None if self._asked.wish.sampling else "length"
        echoes = [(prompt, text) for prompt, text in enumerate(self._asked.echo) if text]
        return [self._chunk(self._choice(prompt, number, text, finish)) for prompt, text in echoes for number in each]

    def piece(self, piece: TextDelta) -> Body:
        """A part of a text."""
        return self._chunk(self._choice(piece.prompt, piece.sequence, piece.text, piece.finish))

    def last(self, done: Finished) -> list[Body]:
        """What a stream ends with: the count of tokens if it is wanted."""
        return [{**self._head, "choices": [], "usage": self._usage(done)}] if self._asked.usage else []

    def _chunk(self, choice: Body) -> Body:
        return {**self._head, "choices": [choice], **({"usage": None} if self._asked.usage else {})}

    def _choice(self, prompt: int, sequence: int, text: str, finish: str | None) -> Body:
        index = prompt * self._asked.per_prompt + sequence
        return {"text": text, "index": index, "logprobs": None, "finish_reason": finish}

    def _usage(self, done: Finished) -> Body:
        read = sum(map(len, self._asked.wish.prompts))
        new = sum(len(text.tokens) for texts in done.texts for text in texts)
        return {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}

    def _logprobs(self, prompt: list[int], text: Completion, scored: TokenLogprobs) -> Body:
        """Per token of the text, and before them of the prompt if it comes back; its first has no probability."""
        skipped = 0 if self._asked.echo[0] else len(prompt)
        tokens = (prompt + text.tokens)[skipped:]
        values: list[float | None] = [None, *scored.logprobs][skipped:]
        words = [self._writer.decode([token]) for token in tokens]
        tops: list[Body | None] = [None] * len(tokens)
        for i, value in enumerate(values):
            if value is not None and self._asked.top:
                best = skipped + i - 1
                tops[i] = {words[i]: value, self._writer.decode([scored.best[best]]): scored.best_logprobs[best]}
        return {
            "tokens": words,
            "token_logprobs": values,
            "top_logprobs": tops if self._asked.top else None,
            "text_offset": [0, *itertools.accumulate(map(len, words))][: len(words)],
        }


def _is_text(value: Any) -> bool:
    """Whether it is text that can be encoded: JSON can hold halves of characters."""
    try:
        return isinstance(value, str) and bool(value.encode())
    except UnicodeError:
        return False


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _shown(value: Any) -> str:
    """What a client sent, as far as it fits in a sentence."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
