"""HTTP for `layerskip_serve`: routes, the queue, streaming, errors. One thread decodes one request at a time."""

import asyncio
import hmac
import json
import math
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from typing import Any, Protocol
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from torchtune import utils

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.serving.config import API_KEY
from layerskip_recipes.serving.requests import ChatRequest, CompletionRequest, Ending, Request, parse

log = utils.get_logger("INFO")

BODY_S = 60  # the longest time that a client may take to send its body
# How much of a refused body is read: most clients read an answer only after they have sent all.
REST_S, REST_BYTES = 5, 2**26
EVENT_S = 0.05  # the shortest time between two events of a stream
NO_KEY = "is not allowed. Allowed without a key: names of this machine"
JSON_TYPES = ("application/json", "application/x-www-form-urlencoded", "")  # the second is the default of curl
LINE = 400  # the longest error message, in characters


class Answering(Protocol):
    """What answers requests, in one thread."""

    name: str  # of the model
    max_body_bytes: int

    def load(self) -> None: ...

    def answer(self, request: Any, gone: threading.Event) -> Iterator[str | Ending]:
        """Pieces of text, then the ending. Fails with ConnectionAbortedError once `gone` is set."""


@dataclass
class Access:
    """Who may use the server. Without a key, no web page may: its browser has access to this machine."""

    api_key: str | None
    is_local: bool  # whether the server listens only to this machine
    allowed_origins: Sequence[str] = ()  # of web pages that have the key


def make_app(answering: Answering, access: Access, max_waiting: int) -> Starlette:
    """The application; loads the model first."""
    server = Server(answering, access, max_waiting)
    routes = [
        Route("/v1/chat/completions", partial(server.answer, ChatRequest), methods=["POST"]),
        Route("/v1/completions", partial(server.answer, CompletionRequest), methods=["POST"]),
        Route("/v1/models", server.models),
        Route("/health", server.health),
    ]
    refused = (HTTPException, ConfigError, ClientDisconnect, asyncio.TimeoutError)
    cors = Middleware(
        CORSMiddleware,
        allow_origins=access.allowed_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["retry-after"],
    )
    return Starlette(routes=routes, middleware=[cors], exception_handlers=dict.fromkeys(refused, _refuse))


class Server:
    """The thread that decodes, and the requests that wait for it."""

    def __init__(self, answering: Answering, access: Access, max_waiting: int) -> None:
        self.answering, self.access, self.max_waiting = answering, access, max_waiting
        self.started, self.pending = int(time.time()), set[asyncio.Future]()
        # All of torch's work is in one thread. Another one would have OpenMP threads of its own, and with more threads
        # than processors they all sleep between matrix products.
        self.thread = ThreadPoolExecutor(1)
        self.thread.submit(answering.load).result()

    async def health(self, _: HTTPRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self, request: HTTPRequest) -> Response:
        self._check_access(request)
        model = {"id": self.answering.name, "object": "model", "created": self.started, "owned_by": "layerskip"}
        return JSONResponse({"object": "list", "data": [model]})

    async def answer(self, request_class: type[Request], request: HTTPRequest) -> ASGIApp:
        """The response, which waits for all earlier ones."""
        self._check_access(request)
        content_type = request.headers.get("content-type", "")
        if content_type.partition(";")[0].strip().lower() not in JSON_TYPES:
            raise HTTPException(415, f"content-type: {content_type!r} is not allowed. Allowed: application/json")
        self._check_room()
        asked = parse(request_class, await asyncio.wait_for(self._body(request), BODY_S))
        if asked.model not in (None, self.answering.name):
            raise HTTPException(404, f"model: {asked.model!r} is not served. Allowed: {self.answering.name!r}")
        self._check_room()
        loop, gone, items = asyncio.get_running_loop(), threading.Event(), asyncio.Queue[Any]()

        def put(item: Any) -> None:
            loop.call_soon_threadsafe(items.put_nowait, item)

        decoding = loop.run_in_executor(self.thread, self._decode, asked, gone, put)
        self.pending.add(decoding)
        decoding.add_done_callback(self.pending.discard)

        async def respond(scope: Scope, receive: Receive, send: Send) -> None:
            responding = asyncio.ensure_future(_respond(asked, self.answering.name, items, scope, receive, send))
            leaving = asyncio.ensure_future(receive())  # the body is read, so the next message is a disconnect
            try:
                await asyncio.wait({responding, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if responding.done():
                    responding.result()
            finally:  # a client that has left frees the model, or its place in the queue
                gone.set()
                for task in (decoding, responding, leaving):
                    task.cancel()

        return respond

    def _decode(self, asked: Any, gone: threading.Event, put: Callable[[Any], Any]) -> None:
        """In the thread that decodes: `put` pieces of text, and then the ending or an exception."""
        text, due = "", 0.0 if asked.stream else math.inf
        try:
            for item in self.answering.answer(asked, gone):
                if isinstance(item, str):
                    text += item
                    if time.monotonic() < due:
                        continue
                # Together: each event takes time from the threads that decode.
                if text:
                    put(text)
                    text, due = "", time.monotonic() + EVENT_S
                if not isinstance(item, str):
                    put(item)
        except (ConfigError, ConnectionAbortedError) as e:
            put(e)
        except Exception as e:
            log.error("a request failed: %s", type(e).__name__)  # its message may have the text of the request
            put(HTTPException(500, "the server failed to answer this request"))

    def _check_access(self, request: HTTPRequest) -> None:
        """Check the key, or else that the request comes from no web page of another host."""
        if self.access.api_key:
            authorization = request.headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(authorization, f"Bearer {self.access.api_key}".encode()):
                raise HTTPException(401, f"authorization: needs the key in the server's {API_KEY}, as Bearer KEY")
            return
        # A page of another site sends its origin. If its name leads to this machine (DNS rebinding), Host has the name.
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if self.access.is_local and not _is_local(f"//{host}"):
            raise HTTPException(403, f"host: {host!r} {NO_KEY}; for example localhost")
        if origin is not None and not _is_local(origin):
            raise HTTPException(403, f"origin: {origin!r} {NO_KEY}. To allow others, set {API_KEY} and allowed_origins")

    def _check_room(self) -> None:
        if len(self.pending) > self.max_waiting:
            line = f"max_waiting: {self.max_waiting} requests wait already. Try again later"
            raise HTTPException(503, line, {"retry-after": "2"})

    async def _body(self, request: HTTPRequest) -> bytes:
        body, limit = bytearray(), self.answering.max_body_bytes
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                raise ConfigError(f"body: is too large for the model's context. Allowed: up to {limit} bytes")
        return bytes(body)


def _is_local(url: str) -> bool:
    try:
        name = urlsplit(url).hostname or ""
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


async def _respond(
    asked: Request, model: str, items: asyncio.Queue, scope: Scope, receive: Receive, send: Send
) -> None:
    item = await items.get()  # a prompt that is refused has its own status, in a stream as well
    is_chat = isinstance(asked, ChatRequest)
    object_name = "chat.completion" if is_chat else "text_completion"
    head = {"id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time())}
    head |= {"object": f"{object_name}.chunk" if is_chat and asked.stream else object_name, "model": model}
    if asked.stream and not isinstance(item, Exception):
        events, headers = _events(asked, is_chat, head, item, items), {"cache-control": "no-cache"}
        response = StreamingResponse(events, media_type="text/event-stream", headers=headers)
        return await response.stream_response(send)
    text = ""
    while isinstance(item, str):
        text, item = text + item, await items.get()
    if isinstance(item, Exception):
        raise item
    content = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
    body = head | _choice(content, item.finish_reason) | {"usage": item.usage}
    await JSONResponse(body)(scope, receive, send)


async def _events(asked: Request, is_chat: bool, head: dict, item: Any, items: asyncio.Queue) -> AsyncIterator[str]:
    """Server-sent events, from the first item on."""
    with_usage = asked.stream_options.include_usage
    head = head | ({"usage": None} if with_usage else {})
    if is_chat:
        yield _event(head | _choice({"delta": {"role": "assistant", "content": ""}}))
    while isinstance(item, str):
        yield _event(head | _choice({"delta": {"content": item}} if is_chat else {"text": item}))
        item = await items.get()
    if isinstance(item, Exception):
        yield _event(_error(500, str(item)))
    else:
        yield _event(head | _choice({"delta": {}} if is_chat else {"text": ""}, item.finish_reason))
        if with_usage:
            yield _event(head | {"choices": [], "usage": item.usage})
    yield "data: [DONE]\n\n"


def _choice(content: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}]}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def _refuse(request: HTTPRequest, e: Exception) -> Response:
    status, line, headers = 400, "; ".join(map(str, e.args)), None
    if isinstance(e, asyncio.TimeoutError):
        status, line = 408, f"body: did not arrive within {BODY_S} seconds"
    elif isinstance(e, HTTPException):
        status, line, headers = e.status_code, e.detail, e.headers
        if status in (404, 405) and not line.startswith("model"):
            line = f"path: {request.method} {request.url.path} is not supported by this server"
    response = JSONResponse(_error(status, line), status, headers)
    if await _has_ended(request):
        return response

    async def answer_and_wait() -> AsyncIterator[bytes]:
        yield bytes(response.body)
        await asyncio.sleep(1)  # a connection that is closed while the client sends loses what the client has not read

    return StreamingResponse(answer_and_wait(), status, {**response.headers, "connection": "close"})


async def _has_ended(request: HTTPRequest) -> bool:
    """Read the rest of a body; returns whether it ended within the limits."""

    async def skip() -> bool:
        size = 0
        async for piece in request.stream():
            size += len(piece)
            if size > REST_BYTES:
                return False
        return True

    try:
        return await asyncio.wait_for(skip(), REST_S)
    except (asyncio.TimeoutError, ClientDisconnect):
        return False
    except RuntimeError:  # starlette's: all of it was read before
        return True


def _error(status: int, line: str) -> dict[str, Any]:
    """OpenAI's form of an error, in one line."""
    line = " ".join(line.encode(errors="backslashreplace").decode().split())
    if len(line) > LINE:
        line = f"{line[: LINE // 2]} ... {line[-LINE // 2 :]}"
    key, colon, _ = line.partition(":")
    error_type = "server_error" if status >= 500 else "invalid_request_error"
    code = {401: "invalid_api_key", 404: "not_found", 503: "server_overloaded"}.get(status)
    return {"error": {"message": line, "type": error_type, "param": key if colon else None, "code": code}}
