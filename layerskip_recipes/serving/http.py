"""HTTP for `layerskip_serve`: routes, the queue, streaming, errors. One thread decodes one request at a time."""

import asyncio
import hmac
import json
import math
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import ip_address
from typing import Any
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
from layerskip_recipes.serving.recipe import KEY, LayerSkipServe
from layerskip_recipes.serving.requests import ChatRequest, CompletionRequest, Request, parse

log = utils.get_logger("INFO")

BODY_S = 60  # the longest time that a client may take to send its body
REST_S, REST_BYTES = (
    5,
    2**26,
)  # how much of a refused body is read: most clients read no answer before they have sent all
EVENT_S = 0.05  # the shortest time between two events of a stream
NO_KEY = "is not allowed. Allowed without a key: names of this machine"
JSON_TYPES = ("application/json", "application/x-www-form-urlencoded", "")  # the second is the default of curl
LINE = 400  # the longest error message, in characters


def make_app(recipe: LayerSkipServe) -> Starlette:
    """The application; loads and compiles the model first."""
    server = Server(recipe)
    routes = [
        Route("/v1/chat/completions", partial(server.answer, ChatRequest), methods=["POST"]),
        Route("/v1/completions", partial(server.answer, CompletionRequest), methods=["POST"]),
        *(Route("/v1/models", server.models), Route("/health", server.health)),
    ]
    kinds = (HTTPException, ConfigError, ClientDisconnect, asyncio.TimeoutError)
    cors = Middleware(
        CORSMiddleware,
        allow_origins=recipe.cfg.allowed_origins or (),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["retry-after"],
    )
    return Starlette(routes=routes, middleware=[cors], exception_handlers=dict.fromkeys(kinds, _refuse))


class Server:
    """The thread that decodes, and the requests that wait for it."""

    def __init__(self, recipe: LayerSkipServe) -> None:
        self.recipe, self.started, self.pending = recipe, int(time.time()), set[asyncio.Future]()
        # All of torch's work is in one thread. Another one would have OpenMP threads of its own, and with more threads
        # than processors they all sleep between matrix products. torch's current device is the thread's own, too.
        self.thread = ThreadPoolExecutor(1, initializer=recipe.cfg.find_device)
        for step in (recipe.setup, recipe.warm_up):
            self.thread.submit(step).result()

    async def health(self, _: HTTPRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self, request: HTTPRequest) -> Response:
        self._check_access(request)
        model = {"id": self.recipe.name, "object": "model", "created": self.started, "owned_by": "layerskip"}
        return JSONResponse({"object": "list", "data": [model]})

    async def answer(self, kind: type[Request], request: HTTPRequest) -> ASGIApp:
        """The response, which waits for all earlier ones."""
        self._check_access(request)
        content_type = request.headers.get("content-type", "")
        if content_type.partition(";")[0].strip().lower() not in JSON_TYPES:
            raise HTTPException(415, f"content-type: {content_type!r} is not allowed. Allowed: application/json")
        self._check_room()
        asked = parse(kind, await asyncio.wait_for(self._body(request), BODY_S))
        if asked.model not in (None, self.recipe.name):
            raise HTTPException(404, f"model: {asked.model!r} is not served. Allowed: {self.recipe.name!r}")
        self._check_room()
        loop, gone, items = asyncio.get_running_loop(), threading.Event(), asyncio.Queue[Any]()

        def put(item: Any) -> None:
            loop.call_soon_threadsafe(items.put_nowait, item)

        decoding = loop.run_in_executor(self.thread, self._decode, asked, gone, put)
        self.pending.add(decoding)
        decoding.add_done_callback(self.pending.discard)

        async def respond(scope: Scope, receive: Receive, send: Send) -> None:
            responding = asyncio.ensure_future(_respond(asked, self.recipe.name, items, scope, receive, send))
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
        """In the thread that decodes: `put` pieces of text, and then a dict or an exception."""
        text, due = "", 0.0 if asked.stream else math.inf
        try:
            for item in self.recipe.answer(asked, gone):
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
        """Check the key. Without one, no web page may use the server: its browser has access to this machine."""
        given, key = request.headers.get("authorization", ""), self.recipe.api_key
        if key:
            if not hmac.compare_digest(given.encode("latin-1"), f"Bearer {key}".encode()):
                raise HTTPException(401, f"authorization: needs the key in the server's {KEY}, as Bearer KEY")
            return
        # A page of another site sends its origin. If its name leads to this machine (DNS rebinding), Host has the name.
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if self.recipe.is_local and not _is_local(f"//{host}"):
            raise HTTPException(403, f"host: {host!r} {NO_KEY}; for example localhost")
        if origin is not None and not _is_local(origin):
            raise HTTPException(403, f"origin: {origin!r} {NO_KEY}. To allow others, set {KEY} and allowed_origins")

    def _check_room(self) -> None:
        if len(self.pending) > (most := self.recipe.cfg.max_waiting):
            line = f"max_waiting: {most} requests wait already. Try again later"
            raise HTTPException(503, line, {"retry-after": "2"})

    async def _body(self, request: HTTPRequest) -> bytes:
        body, most = bytearray(), self.recipe.max_body_bytes
        async for piece in request.stream():
            body += piece
            if len(body) > most:
                raise ConfigError(f"body: is too large for the model's context. Allowed: up to {most} bytes")
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
    kind = "chat.completion" if is_chat else "text_completion"
    head = {"id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time())}
    head |= {"object": f"{kind}.chunk" if is_chat and asked.stream else kind, "model": model}
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
    whole = head | _choice(content, item["finish_reason"]) | {"usage": item["usage"]}
    await JSONResponse(whole)(scope, receive, send)


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
        yield _event(head | _choice({"delta": {}} if is_chat else {"text": ""}, item["finish_reason"]))
        if with_usage:
            yield _event(head | {"choices": [], "usage": item["usage"]})
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
    try:
        has_ended = await asyncio.wait_for(_skip_rest(request), REST_S)
    except (asyncio.TimeoutError, ClientDisconnect):
        has_ended = False
    except RuntimeError:  # starlette's: it was read
        has_ended = True
    response = JSONResponse(_error(status, line), status, headers)
    if has_ended:
        return response

    async def answer_and_wait() -> AsyncIterator[bytes]:
        yield bytes(response.body)
        await asyncio.sleep(1)  # a connection that is closed while the client sends loses what the client has not read

    return StreamingResponse(answer_and_wait(), status, {**response.headers, "connection": "close"})


async def _skip_rest(request: HTTPRequest) -> bool:
    """Read the rest of a body; returns whether it has ended."""
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > REST_BYTES:
            return False
    return True


def _error(status: int, line: str) -> dict[str, Any]:
    """OpenAI's form of an error, in one line."""
    line = " ".join(line.encode(errors="backslashreplace").decode().split())
    if len(line) > LINE:
        line = f"{line[: LINE // 2]} ... {line[-LINE // 2 :]}"
    key, colon, _ = line.partition(":")
    kind = "server_error" if status >= 500 else "invalid_request_error"
    code = {401: "invalid_api_key", 404: "not_found", 503: "server_overloaded"}.get(status)
    return {"error": {"message": line, "type": kind, "param": key if colon else None, "code": code}}
