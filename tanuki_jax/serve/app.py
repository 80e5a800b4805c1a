"""The server's routes: what comes over HTTP, and what goes back."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import hmac
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from openai.types import Model
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tanuki_jax.serve.answers import ChatWriter, CompletionWriter, Writer
from tanuki_jax.serve.engine import Engine
from tanuki_jax.serve.errors import ApiError
from tanuki_jax.serve.exchange import Exchange
from tanuki_jax.serve.prompts import read_conversation
from tanuki_jax.serve.requests import ServedModel, read_chat, read_completion, read_json
from tanuki_jax.serve.spelling import Spelling

logger = logging.getLogger(__name__)

MAX_BODY = 4 << 20  # bytes
BODY_SECONDS = 60.0  # in which a body must have come
INLINE = 1 << 13  # bytes of a body that is read in the event loop; longer ones in a thread
PING_SECONDS = 15.0
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")

Handler = Callable[[HttpRequest], Awaitable[Response]]


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Args:
      keys: of which a request must have one; none = no key is needed.
      loopback: only requests that name this machine as localhost are taken, so that no page of another site reaches the server.
    """

    keys: tuple[str, ...] = ()
    loopback: bool = True


class Api:
    """The handlers, over one engine and one model."""

    def __init__(self, engine: Engine[Any], served: ServedModel, access: Access, max_body: int = MAX_BODY) -> None:
        self._engine, self._served, self._access, self._max_body = engine, served, access, max_body
        self._spelling = Spelling(served.tokenizer)
        self._created = int(time.time())
        self._page = resources.files("tanuki_jax.serve").joinpath("page.html").read_text(encoding="utf-8")

    def app(self) -> Starlette:
        """The application."""
        routes = [
            self._route("/", self.page, "GET", is_open=True),
            self._route("/health", self.health, "GET", is_open=True),
            self._route("/metrics", self.metrics, "GET", is_open=True),
            self._route("/v1/models", self.models, "GET"),
            self._route("/v1/models/{model:path}", self.model, "GET"),
            self._route("/v1/chat/completions", self.chat, "POST"),
            self._route("/v1/completions", self.completion, "POST"),
            self._route("/tokenize", self.tokenize, "POST"),
            self._route("/detokenize", self.detokenize, "POST"),
            self._route("/tokenizer_info", self.tokenizer_info, "GET"),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _http_error})

    def _route(self, path: str, handler: Handler, method: str, is_open: bool = False) -> Route:
        """A route that answers errors in OpenAI's shape, and is counted."""

        async def answer(http: HttpRequest) -> Response:
            begin = time.monotonic()
            try:
                self._check_access(http, is_open)
                response = await handler(http)
            except ApiError as error:
                response = _error(error)
            except ClientDisconnect:
                response = Response(status_code=499)  # nobody reads it
            except Exception:
                logger.exception("%s has failed", path)
                response = _error(ApiError(500, "the server has an error, which its log describes"))
            count = functools.partial(self._count, path, response.status_code, begin)
            if isinstance(response, EventStream):
                response.on_end = count
            else:
                count()
            return response

        return Route(path, answer, methods=[method])

    def _count(self, path: str, status: int, begin: float) -> None:
        self._engine.metrics.count(path, status, time.monotonic() - begin)

    def _check_access(self, http: HttpRequest, is_open: bool) -> None:
        host, origin = http.headers.get("host", ""), http.headers.get("origin")
        if self._access.loopback and re.sub(r":\d+$", "", host).lower() not in LOOPBACK:
            raise ApiError(403, f"this server is for {', '.join(LOOPBACK)}; --host opens it for other names", code="wrong_host")
        if origin and origin.partition("://")[2] != host:
            raise ApiError(403, "a page of another site may not ask this server", code="wrong_origin")
        if self._access.keys and not is_open:
            sent = http.headers.get("authorization", "").removeprefix("Bearer ").strip().encode("latin-1")  # as it came
            # All keys are compared, in constant time.
            if not sum(hmac.compare_digest(sent, key.encode()) for key in self._access.keys):
                raise ApiError(401, "the API key is missing or wrong: Authorization: Bearer KEY", code="invalid_api_key")

    # --- making text ---------------------------------------------------------------------------------------------------

    async def chat(self, http: HttpRequest) -> Response:
        """POST /v1/chat/completions."""
        return await self._generate(http, read_chat, ChatWriter)

    async def completion(self, http: HttpRequest) -> Response:
        """POST /v1/completions."""
        return await self._generate(http, read_completion, CompletionWriter)

    async def _generate(self, http: HttpRequest, read: Callable[..., Any], kind: type[Writer]) -> Response:
        self._engine.check_ready()
        request = await self._read(http, lambda fields: read(self._served, fields))
        writer = kind(request, self._spelling, self._served.name)
        exchange = Exchange(self._engine, request.jobs)
        if request.stream:
            return EventStream(exchange, writer)
        with exchange:
            if not await exchange.collect(writer.answers, http):
                return Response(status_code=499)  # nobody reads it
        return Response(writer.whole(), media_type="application/json")

    async def _read(self, http: HttpRequest, read: Callable[[dict[str, Any]], Any]) -> Any:
        """What `read` makes of the body's object; off the event loop where it takes long."""
        body = await self._read_body(http)
        if len(body) <= INLINE:
            return read(read_json(body))
        return await asyncio.to_thread(lambda: read(read_json(body)))

    async def _read_body(self, http: HttpRequest) -> bytes:
        too_large = ApiError(413, f"the body has more than {self._max_body:,} bytes", code="body_too_large")
        length = http.headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self._max_body:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in http.stream():
                    body += part
                    if len(body) > self._max_body:
                        raise too_large
        except TimeoutError as error:
            raise ApiError(408, f"the body has not come within {BODY_SECONDS:g} seconds", code="slow_body") from error
        return bytes(body)

    # --- the model and its tokenizer -----------------------------------------------------------------------------------

    def _describe(self) -> dict[str, Any]:
        model = Model(id=self._served.name, object="model", created=self._created, owned_by="tanuki_jax")
        return {**model.model_dump(exclude_unset=True), "max_model_len": self._served.max_length}

    async def models(self, http: HttpRequest) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._describe()]})

    async def model(self, http: HttpRequest) -> Response:
        """GET /v1/models/NAME."""
        if http.path_params["model"] != self._served.name:
            raise ApiError(404, f"this model is not here; it is {self._served.name!r}", "model", "model_not_found")
        return JSONResponse(self._describe())

    async def tokenize(self, http: HttpRequest) -> Response:
        """POST /tokenize, vLLM's: a text as transformers' tokenizer encodes it, or messages as a chat does."""

        def read(fields: dict[str, Any]) -> list[int]:
            text, special = fields.get("prompt"), fields.get("add_special_tokens", True)
            if "messages" in fields:
                return list(read_conversation(self._served.tokenizer, fields["messages"], self._served.max_length).ids)
            if not isinstance(text, str) or not isinstance(special, bool) or not _is_text(text):
                raise ApiError(400, "tokenize takes prompt, a text, and add_special_tokens, true or false", "prompt")
            return self._served.tokenizer.encode_prompt(text, special)

        ids = await self._read(http, read)
        return JSONResponse({"count": len(ids), "max_model_len": self._served.max_length, "tokens": ids, "token_strs": None})

    async def detokenize(self, http: HttpRequest) -> Response:
        """POST /detokenize, vLLM's."""

        def read(fields: dict[str, Any]) -> str:
            ids = fields.get("tokens")
            limit = self._served.vocab_size
            if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < limit for i in ids):
                raise ApiError(400, f"detokenize takes tokens, a list of ids from 0 to {limit - 1}", "tokens")
            return self._served.tokenizer.decode(ids)

        return JSONResponse({"prompt": await self._read(http, read)})

    async def tokenizer_info(self, http: HttpRequest) -> Response:
        """GET /tokenizer_info: the special tokens by their names, and the chat template."""
        tokenizer = self._served.tokenizer
        names = {"bos_token": None, "eos_token": tokenizer.eos_token, "pad_token": None, "unk_token": None}
        info = {**names, **tokenizer.named, "chat_template": tokenizer.chat_template or None}
        return JSONResponse({"tokenizer_class": "PreTrainedTokenizerFast", **info})

    # --- the server itself ---------------------------------------------------------------------------------------------

    async def health(self, http: HttpRequest) -> Response:
        """GET /health: 200 once requests are taken."""
        state, note = self._engine.state, self._engine.note
        status = {"ready": 200, "failed": 500}.get(state, 503)
        return JSONResponse({"status": state, "message": note, "model": self._served.name}, status)

    async def metrics(self, http: HttpRequest) -> Response:
        """GET /metrics, for Prometheus."""
        text = self._engine.metrics.render(self._engine.state == "ready")
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self, http: HttpRequest) -> Response:
        """GET /: a page to chat with the model.  Only its own script and style run in it."""
        hashes = {tag: " ".join(_hashes(self._page, tag)) for tag in ("script", "style")}
        policy = (
            f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }
        return Response(self._page, media_type="text/html; charset=utf-8", headers=headers)


class EventStream(StreamingResponse):
    """A stream of server-sent events.  Its end, or the client's leaving, frees the slots."""

    def __init__(self, exchange: Exchange, writer: Writer) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_events(exchange, writer), media_type="text/event-stream", headers=headers)
        self._exchange = exchange
        self.on_end: Callable[[], None] = lambda: None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._exchange:
                await super().__call__(scope, receive, send)
        finally:
            self.on_end()


async def _events(exchange: Exchange, writer: Writer) -> AsyncIterator[str]:
    for data in writer.begin():
        yield f"data: {data}\n\n"
    async for index, piece in exchange.pieces(PING_SECONDS):
        if piece is None:
            yield ": ping\n\n"
            continue
        if piece.error:
            yield f"data: {piece.error.body()}\n\n"
            return
        writer.answers[index].add(piece)
        for data in writer.piece(index, piece):
            yield f"data: {data}\n\n"
    for data in writer.end():
        yield f"data: {data}\n\n"
    yield "data: [DONE]\n\n"


def _hashes(page: str, tag: str) -> list[str]:
    """What the policy calls the page's own scripts or styles."""
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return [f"'sha256-{base64.b64encode(hashlib.sha256(b.encode()).digest()).decode()}'" for b in blocks]


def _is_text(text: str) -> bool:
    """Whether UTF-8 can hold a text: no half of a surrogate pair stands alone."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _error(error: ApiError) -> Response:
    return Response(error.body(), error.status, error.headers(), media_type="application/json")


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    message = {404: "there is nothing at this address", 405: "this address takes another method"}.get(error.status_code, "no")
    return _error(ApiError(error.status_code, message))
