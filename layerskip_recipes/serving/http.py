"""HTTP for `layerskip_serve`: routes, the queue, streaming, errors. One thread decodes one request at a time."""

import asyncio
import hmac
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from torchtune import utils

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.serving.recipe import KEY, LayerSkipServe
from layerskip_recipes.serving.requests import ChatRequest, CompletionRequest, Request, parse

log = utils.get_logger("INFO")

BODY_S = 60  # the longest time that a client may take to send its body
LINE = 400  # the longest error message, in characters


def make_app(recipe: LayerSkipServe) -> Starlette:
    """The application; compiles first."""
    queue = DecodingQueue(recipe)
    model = {"id": recipe.name, "object": "model", "created": int(time.time()), "owned_by": "layerskip"}

    async def models(request: HTTPRequest) -> Response:
        _check_key(request, recipe.api_key)
        return JSONResponse({"object": "list", "data": [model]})

    async def health(_: HTTPRequest) -> Response:
        return JSONResponse({"status": "ok"})

    routes = [
        Route("/v1/chat/completions", Answers(queue, ChatRequest), methods=["POST"]),
        Route("/v1/completions", Answers(queue, CompletionRequest), methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
    ]
    kinds = (HTTPException, ConfigError, ClientDisconnect, asyncio.TimeoutError)
    return Starlette(routes=routes, exception_handlers=dict.fromkeys(kinds, _refuse))


class DecodingQueue:
    """The thread that decodes, and the requests that wait for it."""

    def __init__(self, recipe: LayerSkipServe) -> None:
        self.recipe, self.pending, self.last_s = recipe, 0, 1.0
        # torch's current device is the thread's own.
        self.thread = ThreadPoolExecutor(1, initializer=recipe.cfg.find_device)
        self.thread.submit(recipe.warm_up).result()

    def check_room(self) -> None:
        most = self.recipe.cfg.max_waiting
        if self.pending > most:
            wait = {"retry-after": str(max(1, round(self.last_s)))}
            raise HTTPException(503, f"max_waiting: {most} requests wait already. Try again later", wait)

    def submit(self, asked: Any, gone: threading.Event, put: Callable[[Any], None]) -> asyncio.Future:
        """Decode when all earlier requests are done. `put` gets pieces of text, and then a dict or an exception."""
        loop = asyncio.get_running_loop()

        def decode() -> None:
            started = time.perf_counter()
            try:
                for item in self.recipe.answer(asked, gone):
                    loop.call_soon_threadsafe(put, item)
            except Exception as e:
                if not isinstance(e, ConfigError | ConnectionAbortedError):
                    log.error("a request failed: %s", type(e).__name__)  # the message may have the request's text
                    e = HTTPException(500, "the server failed to answer this request")
                loop.call_soon_threadsafe(put, e)
            self.last_s = time.perf_counter() - started

        def end(_: Any) -> None:
            self.pending -= 1

        self.check_room()
        self.pending += 1
        decoding = loop.run_in_executor(self.thread, decode)
        decoding.add_done_callback(end)
        return decoding


class Answers:
    """Answers one kind of request, as an ASGI application."""

    def __init__(self, queue: DecodingQueue, kind: type[Request]) -> None:
        self.queue, self.recipe, self.kind, self.is_chat = queue, queue.recipe, kind, kind is ChatRequest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = HTTPRequest(scope, receive)
        _check_key(request, self.recipe.api_key)
        self.queue.check_room()
        asked = parse(self.kind, await asyncio.wait_for(self._body(request), BODY_S))
        if asked.model not in (None, self.recipe.name):
            raise HTTPException(404, f"model: {asked.model!r} is not served. Allowed: {self.recipe.name!r}")
        gone, items = threading.Event(), asyncio.Queue[Any]()
        decoding = self.queue.submit(asked, gone, items.put_nowait)
        respond = asyncio.ensure_future(self._respond(asked, items, scope, receive, send))
        leave = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({respond, leave}, return_when=asyncio.FIRST_COMPLETED)
            if respond.done():
                respond.result()
        finally:  # a client that has left frees the model, or its place in the queue
            gone.set()
            for task in (decoding, respond, leave):
                task.cancel()

    async def _body(self, request: HTTPRequest) -> bytes:
        body, most = bytearray(), self.recipe.cfg.max_body_bytes
        async for piece in request.stream():
            body += piece
            if len(body) > most:
                raise ConfigError(f"body: is too large. Allowed: {most} bytes, the server's max_body_bytes")
        return bytes(body)

    async def _respond(self, asked: Request, items: asyncio.Queue, scope: Scope, receive: Receive, send: Send) -> None:
        first = await items.get()  # an error in the prompt comes first, so that it has its own status
        name = "chat.completion" if self.is_chat else "text_completion"
        head = {"id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time())}
        head |= {"object": name + ".chunk" * (self.is_chat and asked.stream), "model": self.recipe.name}
        if asked.stream and not isinstance(first, Exception):
            events = self._events(asked, head, first, items)
            response = StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
            return await response.stream_response(send)
        text = ""
        while isinstance(first, str):
            text, first = text + first, await items.get()
        if isinstance(first, Exception):
            raise first
        content = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        whole = head | _choices(content, first["finish_reason"]) | {"usage": first["usage"]}
        await JSONResponse(whole)(scope, receive, send)

    async def _events(self, asked: Request, head: dict, item: Any, items: asyncio.Queue) -> AsyncIterator[str]:
        """Server-sent events."""
        with_usage = asked.stream_options.include_usage
        head = head | ({"usage": None} if with_usage else {})
        if self.is_chat:
            yield _event(head | _choices({"delta": {"role": "assistant", "content": ""}}))
        while isinstance(item, str):
            yield _event(head | _choices({"delta": {"content": item}} if self.is_chat else {"text": item}))
            item = await items.get()
        if isinstance(item, Exception):
            yield _event(_error(500, str(item)))
        else:
            yield _event(head | _choices({"delta": {}} if self.is_chat else {"text": ""}, item["finish_reason"]))
            if with_usage:
                yield _event(head | {"choices": [], "usage": item["usage"]})
        yield "data: [DONE]\n\n"


def _choices(content: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}]}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _check_key(request: HTTPRequest, key: str | None) -> None:
    given = request.headers.get("authorization", "").encode()
    if key and not hmac.compare_digest(given, f"Bearer {key}".encode()):
        raise HTTPException(401, f"authorization: needs the key in the server's {KEY}, as Bearer KEY")


async def _refuse(request: HTTPRequest, e: Exception) -> Response:
    status, line, headers = 400, "; ".join(map(str, e.args)), None
    if isinstance(e, asyncio.TimeoutError):
        status, line = 408, f"body: did not arrive within {BODY_S} seconds"
    elif isinstance(e, HTTPException):
        status, line, headers = e.status_code, e.detail, e.headers
        if ":" not in line:  # starlette's own
            line = f"path: {request.method} {request.url.path} is not supported by this server"
    return JSONResponse(_error(status, line), status, headers)


def _error(status: int, line: str) -> dict[str, Any]:
    """OpenAI's form of an error, in one line."""
    line = " ".join(line.encode(errors="backslashreplace").decode().split())
    if len(line) > LINE:
        line = f"{line[: LINE // 2]} ... {line[-LINE // 2 :]}"
    key, colon, _ = line.partition(":")
    kind = "server_error" if status >= 500 else "invalid_request_error"
    code = {401: "invalid_api_key", 404: "not_found", 503: "server_overloaded"}.get(status)
    return {"error": {"message": line, "type": kind, "param": key if colon else None, "code": code}}
