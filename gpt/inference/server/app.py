"""OpenAI-compatible HTTP routes over a ``RequestQueue``."""

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
LEAVE_SECONDS = 3  # for responses to reach their clients when the server ends
DISCARDED = 64 << 20  # bytes of a body too large that are read, so that the client gets to read why
STREAM = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # proxies pass pieces on as they come
CLIENT_CLOSED_REQUEST = 499  # nginx's
SERVER_ERROR = "the server failed; its log says why"
PATHS = "POST /v1/completions, GET /v1/models, GET /health"


class CompletionsApp:
    """The routes; ``defaults`` are of fields that a request does not give, clients must send ``key``."""

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
                ClientDisconnect: _client_closed,
                Exception: _server_error,
            },
        )
        self.app.router.redirect_slashes = False

    def open(self, writer: TextGenerator) -> None:
        """Accept requests for the model, which is loaded now."""
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
        """Refuse a client without the key."""
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
        completion = await run_in_threadpool(check)  # a long prompt takes a while to encode
        responses = ResponseBuilder(completion, self._model, self._writer)
        pending = PendingRequest(completion.wish, self._desk, request)
        await pending.started(self._settings.queue_seconds)
        if completion.stream:
            return StreamingResponse(_events(pending, responses), headers=STREAM, media_type="text/event-stream")
        done = await pending.next_event()
        assert isinstance(done, Finished)
        return JSONResponse(responses.whole(done))


class PendingRequest:
    """A request in the queue, for as long as its client is connected.

    Raises:
        ApiError: the queue is full.
    """

    def __init__(self, wish: GenerationRequest, desk: RequestQueue, request: Request) -> None:
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()  # None: the client has disconnected

        def tell(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._desk, self._order = desk, QueuedRequest(wish, tell)
        try:
            desk.put(self._order)
        except UnavailableError as error:
            raise ApiError(503, f"{error}; try again later") from error
        self._watch = asyncio.create_task(self._until_gone(request))

    async def _until_gone(self, request: Request) -> None:
        """Wait until the connection is closed or the response sent."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._desk.leave(self._order)
        self._events.put_nowait(None)

    async def started(self, seconds: float) -> None:
        """Wait for the model to start on it.

        Raises:
            ApiError: it did not within ``seconds``, or will not.
            ClientDisconnect: the client has disconnected.
        """
        try:
            await asyncio.wait_for(self.next_event(), seconds)
        except asyncio.TimeoutError as error:
            message = f"the request waited {seconds:g} s for its turn (serve.queue_seconds); try again later"
            raise ApiError(504, message) from error

    async def next_event(self) -> Started | TextDelta | Finished:
        """Wait for the next event.

        Raises:
            ApiError: the model stopped.
            ClientDisconnect: the client has disconnected.
        """
        event = await self._events.get()
        if isinstance(event, Started | TextDelta | Finished):
            return event
        if event is None:
            raise ClientDisconnect
        failed = isinstance(event, FailedError)
        raise ApiError(500, SERVER_ERROR) if failed else ApiError(503, f"{event}; try again later")


async def _events(pending: PendingRequest, responses: ResponseBuilder) -> AsyncIterator[str]:
    """Yield server-sent events: an object for every piece, then ``[DONE]``."""

    def event(body: dict[str, Any]) -> str:
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    try:
        for body in responses.first():
            yield event(body)
        while isinstance(news := await pending.next_event(), Started | TextDelta):
            if isinstance(news, TextDelta):
                yield event(responses.piece(news))
        for body in responses.last(news):
            yield event(body)
        yield "data: [DONE]\n\n"
    except ApiError as error:  # the status is sent already
        yield event(error.body)
    except ClientDisconnect:
        return


async def _json(request: Request, most: int) -> Any:
    """Return the body, of at most ``most`` bytes.

    Raises:
        ApiError: it is too large or not JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a page of another site cannot send without a preflight request
        raise ApiError(415, f"Content-Type: application/json, not {kind or 'nothing'}")
    size, body = 0, bytearray()
    expects_continue = "expect" in request.headers and int(request.headers.get("content-length", "0")) > most
    if not expects_continue:
        async for chunk in request.stream():
            size += len(chunk)
            if size <= most:
                body += chunk
            elif size > DISCARDED:
                break
    if expects_continue or size > most:
        raise ApiError(413, f"the body has more than {most} bytes (serve.max_body)")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer an unknown path or method."""
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase.lower()
    message = f"{phrase}: {request.method} {request.scope['path'][:200]}; this server has {PATHS}"
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: RETRY, 504: RETRY}.get(error.status)
    return JSONResponse(error.body, error.status, headers)


async def _client_closed(request: Request, error: Exception) -> Response:
    """Answer a client that disconnected, perhaps before it sent its body."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _server_error(request: Request, error: Exception) -> Response:
    """Answer after an error of the server, which its log has."""
    return JSONResponse(ApiError(500, SERVER_ERROR).body, 500)


class ServerThread:
    """An HTTP server in a thread."""

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
        """Finish the responses under way, then stop."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # clients that do not read are cut
        self._server.should_exit = True
        self._thread.join(LEAVE_SECONDS + 2)
