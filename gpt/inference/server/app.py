"""HTTP as OpenAI's clients speak it, over a ``Desk``: it checks, lets wait, and passes on what the model writes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gpt.config.task_schemas import Generate, Serve
from gpt.inference.server import openai_protocol
from gpt.inference.server.openai_protocol import ApiError, ResponseBuilder
from gpt.inference.server.request_queue import (
    Event,
    FailedError,
    Finished,
    GenerationRequest,
    QueuedRequest,
    RequestQueue,
    Started,
    UnavailableError,
)
from gpt.inference.types import TextDelta, TextGenerator

RETRY = {"Retry-After": "2"}  # seconds
LEAVE_SECONDS = 3  # for answers to reach their clients when the server ends
DISCARDED = 64 << 20  # bytes of a body too large that are read, so that the client gets to read why
STREAM = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # proxies pass pieces on as they come
NOBODY = 499  # nginx's: the client closed the connection
OURS = "the server failed; its log says why"
PATHS = "POST /v1/completions, GET /v1/models, GET /health"


class CompletionsApp:
    """The routes. ``writer`` is there from ``open`` on.

    Args:
        settings: the limits.
        defaults: of what requests do not say.
        model: what the model is called.
        desk: where somebody takes the orders.
        key: that clients must send; None: anyone may ask.
    """

    def __init__(
        self, settings: Serve, defaults: Generate, model: str, desk: RequestQueue, key: str | None = None
    ) -> None:
        self._settings, self._defaults, self._model = settings, defaults, model
        self._desk = desk
        self._key = key
        self._writer: TextGenerator | None = None
        self._since = int(time.time())
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/models", self._models, methods=["GET"]),
                Route("/v1/models/{name:path}", self._model_of, methods=["GET"]),
                Route("/health", self._health, methods=["GET"]),
            ],
            exception_handlers={
                HTTPException: _http_error,
                ApiError: _api_error,
                ClientDisconnect: _nobody,
                Exception: _our_error,
            },
        )
        self.app.router.redirect_slashes = False

    def open(self, writer: TextGenerator) -> None:
        """The model is there: take orders."""
        self._writer = writer
        self._desk.open()

    async def _health(self, request: Request) -> Response:
        state, running = self._desk.state, int(self._desk.running is not None)
        body = {"status": state, "model": self._model, "running": running, "waiting": self._desk.waiting}
        return JSONResponse(body, 200 if state == "ready" else 503)

    async def _models(self, request: Request) -> Response:
        self._admit(request)
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _model_of(self, request: Request) -> Response:
        self._admit(request)
        if request.path_params["name"] != self._model:
            raise ApiError(404, f"no such model; this server has {self._model}", param="model", code="model_not_found")
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        return {"id": self._model, "object": "model", "created": self._since, "owned_by": "gpt"}

    def _admit(self, request: Request) -> None:
        """Refuse who has not the key."""
        sent = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._key is not None and not hmac.compare_digest(sent.encode("latin-1"), self._key.encode()):
            raise ApiError(401, "the header Authorization: Bearer KEY has not the server's key", code="invalid_api_key")

    async def _completions(self, request: Request) -> Response:
        self._admit(request)
        body = await _json(request, self._settings.max_body)
        if self._writer is None:
            raise ApiError(503, f"the server is {self._desk.state}; try again later")
        check = functools.partial(
            openai_protocol.parse, body, self._model, self._defaults, self._settings, self._writer
        )
        asked = await run_in_threadpool(check)  # a long prompt takes a while to encode
        answers, visit = (
            ResponseBuilder(asked, self._model, self._writer),
            PendingRequest(asked.wish, self._desk, request),
        )
        await visit.turn(self._settings.queue_seconds)
        if asked.stream:
            return StreamingResponse(_events(visit, answers), headers=STREAM, media_type="text/event-stream")
        done = await visit.news()
        assert isinstance(done, Finished)
        return JSONResponse(answers.whole(done))


class PendingRequest:
    """An order, wanted for as long as its client waits for an answer.

    Raises:
        ApiError: there is no place.
    """

    def __init__(self, wish: GenerationRequest, desk: RequestQueue, request: Request) -> None:
        loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[Event | None] = asyncio.Queue()  # None: nobody is there to be told

        def tell(news: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._news.put_nowait, news)

        self._desk, self._order = desk, QueuedRequest(wish, tell)
        try:
            desk.put(self._order)
        except UnavailableError as error:
            raise ApiError(503, f"{error}; try again later") from error
        self._watch = asyncio.create_task(self._until_gone(request))

    async def _until_gone(self, request: Request) -> None:
        """Until the connection is closed, or whatever answer has been sent."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._desk.leave(self._order)
        self._news.put_nowait(None)

    async def turn(self, seconds: float) -> None:
        """Wait for the model to begin.

        Raises:
            ApiError: it did not within ``seconds``, or will not.
            ClientDisconnect: nobody waits any more.
        """
        try:
            await asyncio.wait_for(self.news(), seconds)
        except asyncio.TimeoutError as error:
            message = f"the request waited {seconds:g} s for its turn (serve.queue_seconds); try again later"
            raise ApiError(504, message) from error

    async def news(self) -> Started | TextDelta | Finished:
        """What happens next.

        Raises:
            ApiError: the model stopped.
            ClientDisconnect: nobody waits any more.
        """
        news = await self._news.get()
        if isinstance(news, Started | TextDelta | Finished):
            return news
        if news is None:
            raise ClientDisconnect
        broken = isinstance(news, FailedError)
        raise ApiError(500, OURS) if broken else ApiError(503, f"{news}; try again later")


async def _events(visit: PendingRequest, answers: ResponseBuilder) -> AsyncIterator[str]:
    """Server-sent events: an object for every piece, and that it is all."""

    def event(body: dict[str, Any]) -> str:
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    try:
        for body in answers.first():
            yield event(body)
        while isinstance(news := await visit.news(), Started | TextDelta):
            if isinstance(news, TextDelta):
                yield event(answers.piece(news))
        for body in answers.last(news):
            yield event(body)
        yield "data: [DONE]\n\n"
    except ApiError as error:  # the status is sent already
        yield event(error.body)
    except ClientDisconnect:
        return


async def _json(request: Request, most: int) -> Any:
    """The body, of at most so many bytes.

    Raises:
        ApiError: it is too large or not JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a page of another site cannot send without being asked about
        raise ApiError(415, f"Content-Type: application/json, not {kind or 'nothing'}")
    size, body = 0, bytearray()
    asks_first = "expect" in request.headers and int(request.headers.get("content-length", "0")) > most
    if not asks_first:
        async for chunk in request.stream():
            size += len(chunk)
            if size <= most:
                body += chunk
            elif size > DISCARDED:
                break
    if asks_first or size > most:
        raise ApiError(413, f"the body has more than {most} bytes (serve.max_body)")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path, or another method."""
    assert isinstance(error, HTTPException)
    what = HTTPStatus(error.status_code).phrase.lower()
    message = f"{what}: {request.method} {request.scope['path'][:200]}; this server has {PATHS}"
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: RETRY, 504: RETRY}.get(error.status)
    return JSONResponse(error.body, error.status, headers)


async def _nobody(request: Request, error: Exception) -> Response:
    """The client has gone, also where its body was still awaited."""
    return Response(status_code=NOBODY)


async def _our_error(request: Request, error: Exception) -> Response:
    """Our own mistake; the server's log has it."""
    return JSONResponse(ApiError(500, OURS).body, 500)


class ServerThread:
    """The routes at an address, in a thread."""

    def __init__(self, service: CompletionsApp, listener: socket.socket) -> None:
        config = uvicorn.Config(
            service.app,
            log_config=None,
            access_log=False,
            lifespan="off",
            http="h11",
            ws="none",
            loop="asyncio",
            server_header=False,
            timeout_graceful_shutdown=LEAVE_SECONDS,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let answers reach their clients, then end."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # clients that do not read are cut
        self._server.should_exit = True
        self._thread.join(LEAVE_SECONDS + 2)
