"""The HTTP application: OpenAI's completions and chat of one model, health and metrics."""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from was_search.errors import WasError
from was_search.process.plain_json import dumps
from was_search.service.serving.engine import DecodingFailed, Ended, Engine, Job, NoPlace, Prompt, ServerEnds
from was_search.service.serving.requests import (
    ChatRequest,
    CompletionRequest,
    RequestError,
    _Request,
    read_request,
)
from was_search.texts.chat import conversation_ids
from was_search.texts.tokens import prompt_ids, require_rows

MOST_BYTES = 4 << 20
"""Longest body of a request."""

_SHORT = 16
"""New tokens of a completion that does not say how many, as OpenAI has it."""

_LOOK_SECONDS = 0.25


@dataclass(frozen=True)
class Served:
    """The model that answers, and its limits.

    Attributes:
        name: what clients call it.
        tokenizer: of the model.
        rows: ids that the model has rows for.
        positions: prompt and new tokens together; None: no limit is known.
        most_new: new tokens of one request.
        ends: ids that end a text; ``chat_ends`` those that end an answer in a chat.
        api_key: that clients must send; "": none.
        chat_ends: see ``ends``.
    """

    name: str
    tokenizer: Any
    rows: int
    positions: int | None
    most_new: int
    ends: frozenset[int]
    api_key: str = ""
    chat_ends: frozenset[int] = frozenset()


class Figures:
    """What the server tells Prometheus."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "was_search_requests", "Requests by path and status.", ["path", "status"], registry=self.registry
        )
        self.tokens = Counter("was_search_tokens", "Tokens by kind.", ["kind"], registry=self.registry)
        self.first = Histogram(
            "was_search_first_part_seconds", "From a request to the first part of its text.", registry=self.registry
        )
        self.seconds = Histogram(
            "was_search_request_seconds", "From a request to the end of its text.", registry=self.registry
        )
        there = Gauge("was_search_requests_in_flight", "Waiting or decoded now.", registry=self.registry)
        there.set_function(lambda: engine.requests)


@dataclass
class _Answer:
    """One answer on its way to a client, and how its pieces are written."""

    server: Server
    asked: Any
    job: Job
    chat: bool
    number: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    started: float = field(default_factory=time.perf_counter)
    began: bool = False

    async def parts(self) -> AsyncIterator[str | Ended]:
        """Of the text, with what the figures want of them."""
        figures = self.server.figures
        async with aclosing(self.server.engine.decode(self.job)) as parts:  # type: ignore[type-var]
            async for part in parts:
                if not self.began:
                    self.began = True
                    figures.first.observe(time.perf_counter() - self.started)
                if isinstance(part, Ended):
                    figures.seconds.observe(time.perf_counter() - self.started)
                    figures.tokens.labels("prompt").inc(len(self.job.prompt.ids))
                    figures.tokens.labels("new").inc(part.tokens)
                yield part

    def usage(self, ended: Ended) -> dict[str, int]:
        there = len(self.job.prompt.ids)
        return {"prompt_tokens": there, "completion_tokens": ended.tokens, "total_tokens": there + ended.tokens}

    def whole(self, text: str, ended: Ended) -> dict[str, Any]:
        """The answer in one piece."""
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {**self._frame(said, ended.finish, chunk=False), "usage": self.usage(ended)}

    def chunk(self, text: str | None, finish: str | None = None) -> dict[str, Any]:
        """A piece of it."""
        if not self.chat:
            return self._frame({"text": text or ""}, finish, chunk=True)
        delta = {} if text is None else {"content": text}
        return self._frame({"delta": delta}, finish, chunk=True)

    def opening(self) -> dict[str, Any]:
        """What a streamed answer in a chat begins with."""
        return self._frame({"delta": {"role": "assistant", "content": ""}}, None, chunk=True)

    def closing(self, ended: Ended) -> dict[str, Any]:
        """What it ends with where the usage was asked for."""
        return {**self._frame(None, None, chunk=True), "usage": self.usage(ended)}

    def _frame(self, said: dict[str, Any] | None, finish: str | None, *, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        choices = [] if said is None else [{"index": 0, **said, "finish_reason": finish, "logprobs": None}]
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.number}",
            "object": kind,
            "created": self.created,
            "model": self.server.served.name,
            "choices": choices,
        }


@dataclass
class Server:
    """The routes of one model; ``application`` is what uvicorn runs."""

    served: Served
    engine: Engine

    def __post_init__(self) -> None:
        self.figures = Figures(self.engine)

    @property
    def application(self) -> Starlette:
        routes = [
            Route("/v1/models", self._guarded(self._models), methods=["GET"]),
            Route("/v1/models/{name:path}", self._guarded(self._model), methods=["GET"]),
            Route("/v1/completions", self._guarded(self._completions), methods=["POST"]),
            Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
        ]
        handlers: Any = {HTTPException: _not_there}
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.engine.close)

    def _guarded(self, route: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """``route`` for those who have the key, with refusals in OpenAI's shape, counted."""

        async def guarded(request: Request) -> Response:
            try:
                self._require_key(request)
                response = await route(request)
            except RequestError as error:
                response = JSONResponse(error.to_json(), error.status)
                if error.status == 429:
                    response.headers["Retry-After"] = "1"
            except DecodingFailed as error:
                failed = _failed(error)
                response = JSONResponse(failed.to_json(), failed.status)
            self.figures.requests.labels(request.url.path, response.status_code).inc()
            return response

        return guarded

    def _require_key(self, request: Request) -> None:
        if not self.served.api_key:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), self.served.api_key.encode()):
            raise RequestError(
                401, "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'", code="invalid_api_key"
            )

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        self._require_model(request.path_params["name"])
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        return {"id": self.served.name, "object": "model", "created": 0, "owned_by": "was-search"}

    async def _completions(self, request: Request) -> Response:
        asked: CompletionRequest = read_request(CompletionRequest, await _body(request))
        self._require_model(asked.model)
        prompt = asked.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
            if len(prompt) > 1:
                raise RequestError(400, "prompt: one at a time; send a request for each", param="prompt")
            prompt = str(prompt[0])
        if not prompt:
            raise RequestError(400, "prompt: must not be empty", param="prompt")
        if isinstance(prompt, list):
            ids = _given_ids(prompt, self.served.rows)
        else:
            ids = _ids(lambda: prompt_ids(prompt, self.served.tokenizer), "prompt")
        return await self._answered(request, asked, ids, _SHORT, chat=False)

    async def _chat(self, request: Request) -> Response:
        asked: ChatRequest = read_request(ChatRequest, await _body(request))
        self._require_model(asked.model)
        messages = [message.plain() for message in asked.messages]
        ids = _ids(lambda: conversation_ids(messages, self.served.tokenizer), "messages")
        return await self._answered(request, asked, ids, self.served.most_new, chat=True)

    def _require_model(self, name: str) -> None:
        if name != self.served.name:
            raise RequestError(
                404,
                f"the model {name[:80]!r} is not served here; this is {self.served.name!r}",
                param="model",
                code="model_not_found",
            )

    async def _answered(self, request: Request, asked: Any, ids: list[int], usual: int, *, chat: bool) -> Response:
        prompt = self._prompt(asked, ids, usual, chat)
        try:
            job = self.engine.admit(prompt)
        except NoPlace as error:
            raise RequestError(429, str(error), kind="rate_limit_error", code="rate_limit_exceeded") from error
        answer = _Answer(self, asked, job, chat)
        if asked.stream:
            return _Stream(answer)
        try:
            return await _whole(request, answer)
        finally:
            self.engine.leave(job)

    def _prompt(self, asked: _Request, ids: list[int], usual: int, chat: bool) -> Prompt:
        from was_kernels import Sampling

        served = self.served
        _ids(lambda: _within_rows(ids, served), "prompt")
        room = served.most_new if served.positions is None else served.positions - len(ids)
        most = asked.most or max(1, min(usual, room, served.most_new))
        if most > served.most_new:
            raise RequestError(
                400, f"max_tokens: at most {served.most_new} for one request, got {most}", param="max_tokens"
            )
        if most > room:
            raise RequestError(
                400,
                f"{len(ids)} tokens of the prompt and {most} new ones exceed the model's {served.positions} positions",
                param="messages" if chat else "prompt",
                code="context_length_exceeded",
            )
        sampling = Sampling(
            repetition_penalty=asked.repetition_penalty,
            temperature=asked.temperature,
            top_k=max(0, asked.top_k),
            top_p=asked.top_p,
            seed=(uuid.uuid4().int if asked.seed is None else asked.seed) % 2**63,
        )
        return Prompt(ids, most, sampling, tuple(asked.stops), served.chat_ends if chat else served.ends)

    async def _health(self, _: Request) -> Response:
        alive = self.engine.alive
        return JSONResponse({"status": "ok" if alive else "the decoding thread has ended"}, 200 if alive else 503)

    async def _metrics(self, _: Request) -> Response:
        return PlainTextResponse(generate_latest(self.figures.registry), media_type="text/plain; version=0.0.4")


class _Stream(StreamingResponse):
    """A streamed answer; its place is given back where it ends, and where its client goes, even before it begins."""

    def __init__(self, answer: _Answer) -> None:
        super().__init__(_events(answer), media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.server.engine.leave(self._answer.job)


async def _whole(request: Request, answer: _Answer) -> Response:
    """The answer in one piece; nothing more is decoded once the client has gone."""
    text: list[str] = []
    async with aclosing(answer.parts()) as parts:  # type: ignore[type-var]
        pending: Any = None
        try:
            while True:
                pending = pending or asyncio.ensure_future(anext(parts))
                done, _ = await asyncio.wait({pending}, timeout=_LOOK_SECONDS)
                if not done:
                    if await request.is_disconnected():
                        return Response(status_code=499)
                    continue
                part, pending = pending.result(), None
                if isinstance(part, Ended):
                    return JSONResponse(answer.whole("".join(text), part))
                text.append(part)
                if await request.is_disconnected():
                    return Response(status_code=499)
        finally:
            if pending is not None:
                pending.cancel()
                await asyncio.wait({pending})


async def _events(answer: _Answer) -> AsyncIterator[str]:
    """The answer as server-sent events."""
    if answer.chat:
        yield _event(answer.opening())
    try:
        async with aclosing(answer.parts()) as parts:  # type: ignore[type-var]
            async for part in parts:
                if not isinstance(part, Ended):
                    yield _event(answer.chunk(part))
                    continue
                yield _event(answer.chunk(None, part.finish))
                if answer.asked.stream_options is not None and answer.asked.stream_options.include_usage:
                    yield _event(answer.closing(part))
    except DecodingFailed as error:
        yield _event(_failed(error).to_json())
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {dumps(value)}\n\n"


def _failed(error: DecodingFailed) -> RequestError:
    if isinstance(error, ServerEnds):
        return RequestError(503, str(error), kind="server_error", code="service_unavailable")
    return RequestError(500, f"decoding failed: {error}", kind="server_error")


async def _body(request: Request) -> bytes:
    """At most :data:`MOST_BYTES` of JSON; pages of other sites cannot send that type unasked."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError(415, "the body must be JSON, with Content-Type: application/json")
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > MOST_BYTES:
                raise RequestError(413, f"the body is longer than {MOST_BYTES} bytes")
    except ClientDisconnect as error:  # nobody reads this
        raise RequestError(400, "the body ended early") from error
    return bytes(body)


def _ids(make: Callable[[], Any], param: str) -> list[int]:
    """Token ids as ``make`` gives them, its errors as the client's."""
    try:
        return [int(i) for i in make()]
    except WasError as error:
        raise RequestError(400, str(error), param=param) from error


def _given_ids(prompt: list[Any], rows: int) -> list[int]:
    """The token ids that a client has sent, all of which the model has a row for."""
    beyond = next((i for i in prompt if not 0 <= i < rows), None)
    if beyond is not None:
        got = beyond if abs(beyond) < 2**63 else "a longer one"
        raise RequestError(400, f"prompt: token ids must be from 0 to {rows - 1}, got id {got}", param="prompt")
    return [int(i) for i in prompt]


def _within_rows(ids: list[int], served: Served) -> list[int]:
    import numpy as np

    require_rows(np.asarray(ids, np.int64), served.rows, served.tokenizer, "the prompt")
    return ids


async def _not_there(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(RequestError(error.status_code, message).to_json(), error.status_code, error.headers)
