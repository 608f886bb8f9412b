"""The gate in front of the API, in plain ASGI: addresses, tokens, the size of a body, hang-ups, metrics and the log.

- REC_API_TOKENS (or API_TOKENS) open /v1/*; REC_ADMIN_TOKENS open /v1/* and the reload, which is closed without them.
  Comma-separated, from the environment or `.env` (the environment wins); sent as `Authorization: Bearer TOKEN`.
- A variable that is set but empty, although `.env` has tokens for it, ends the start: nobody opens an API by accident.
- An address or headers that two programs could understand differently are refused.
- Without API tokens /v1/* is open to all; with `required` everything but the health checks is closed to all.
- A request whose client has hung up is cancelled, so that no model works for it.
- The log is one line per request on stdout, JSON or text. A request keeps its X-Request-ID, or gets one.

Not covered: users, scopes, rate limits, TLS. Those belong to the proxy in front.
"""

import asyncio
import hmac
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote_to_bytes

from dotenv import dotenv_values
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rec.errors import UserError
from rec.ops.serving.connections import MAX_HEADERS
from rec.ops.serving.metrics import HUNG_UP, REQUEST_SECONDS, REQUESTS
from rec.serving.schemas import MAX_BATCH_BODY, MAX_BODY

HEALTH = ("/healthz", "/readyz")
TOKENS = ("REC_API_TOKENS", "API_TOKENS", "REC_ADMIN_TOKENS")
MAX_URL = 8 * 1024  # bytes: room for an id of 512 characters, each of them four bytes and escaped
PAGE, RELOAD, BATCH, EVENTS = "/", "/v1/models/reload", "/v1/recommend/batch", "/v1/events"
TICK = 0.05  # seconds between looks for clients that have hung up, and between writes of the log
REQUEST_ID = re.compile(rb"[\w.:/+=-]{1,128}")


@dataclass(frozen=True)
class Tokens:
    api: tuple[str, ...] = ()
    admin: tuple[str, ...] = ()
    required: bool = False

    @classmethod
    def from_environment(cls, required: bool) -> "Tokens":
        """
        Raises:
          UserError: a variable is empty in the environment but not in `.env`, holds commas alone, or a token that no
            header can carry.
        """
        file = _dotenv()
        for name in TOKENS:
            if file.get(name) and not os.environ.get(name, "unset").strip():
                raise UserError(
                    f"{name} is empty in the environment, but .env has tokens for it: unset it to use those, or "
                    "delete them from .env"
                )
        values = {**file, **os.environ}
        api, fallback, admin = (_tokens_of(name, values.get(name) or "") for name in TOKENS)
        return cls(api or fallback, admin, required)

    def warning(self) -> str | None:
        """What a person who starts a server with these tokens should know."""
        if self.api:
            return None
        if self.required:
            return "--require-auth without REC_API_TOKENS: requests are refused"
        if {*TOKENS[:2]} & {*_dotenv(), *os.environ}:
            return "REC_API_TOKENS is empty: the API is open to everyone who reaches the port"
        return None

    def refusal(self, path: str, authorization: bytes) -> JSONResponse | None:
        """The answer to a request that may not pass, or None."""
        is_closed = self.required or bool(self.api and f"{path}/".startswith("/v1/"))
        if path in HEALTH or (path != RELOAD and not is_closed):
            return None
        if path == PAGE and self.api:
            return (
                None  # the page holds no data: it asks for a token, and sends it with its requests
            )
        accepted = self.admin if path == RELOAD else self.admin + self.api
        if not accepted:
            return _problem(
                403, "this server was started without the tokens that open this address"
            )
        scheme, _, sent = authorization.partition(b" ")
        equal = [
            hmac.compare_digest(sent.strip(), known.encode()) for known in accepted
        ]  # all of them: the time that it takes reveals nothing
        if scheme.lower() == b"bearer" and any(equal):
            return None
        sentence = "this address needs the header Authorization: Bearer TOKEN, with a valid token"
        return JSONResponse({"detail": sentence}, 401, {"WWW-Authenticate": "Bearer"})


def _dotenv() -> Mapping[str, str | None]:
    try:
        return dotenv_values(".env", interpolate=False)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f".env cannot be read: {error}") from error


def _tokens_of(name: str, value: str) -> tuple[str, ...]:
    """The tokens of a comma-separated list, which may be empty."""
    tokens = tuple(token.strip() for token in value.split(",") if token.strip())
    if value.strip() and not tokens:
        raise UserError(f"{name} holds commas and no token: set tokens, or unset it")
    for number, token in enumerate(tokens, 1):
        if not token.isprintable():  # undecodable bytes of the environment are not, either
            raise UserError(
                f"{name}: token {number} is not UTF-8 text or has control characters, so no client can send it"
            )
    return tokens


def malformed(scope: Scope, headers: Mapping[bytes, bytes]) -> JSONResponse | None:
    """The answer to a request that two programs could understand differently, or None.

    Args:
      headers: the scope's, the last of each name.
    """
    path, raw = scope["path"], scope.get("raw_path") or b""
    if len(raw) + len(scope["query_string"]) > MAX_URL:
        return _problem(414, f"the address is too long: at most {MAX_URL:,} bytes")
    if len(scope["headers"]) > MAX_HEADERS:
        return _problem(431, f"too many headers: at most {MAX_HEADERS}")
    if len(headers) < len(scope["headers"]):
        names = [name for name, _ in scope["headers"]]
        if names.count(b"authorization") > 1:
            return _problem(400, "the header Authorization is repeated: send it once")
    if "\ufffd" in path and not _is_utf8(raw):  # a decoder puts it in place of bad bytes
        return _problem(400, "the address is not UTF-8 text")
    if b"%" in scope["query_string"] and not _is_utf8(scope["query_string"]):
        return _problem(400, "the address is not UTF-8 text")
    if path.endswith("\n"):  # the framework's patterns end with $, which would ignore it
        return _problem(404, "there is nothing at this address; /docs lists what there is")
    return None


def _is_utf8(quoted: bytes) -> bool:
    try:
        unquote_to_bytes(quoted).decode()
    except UnicodeDecodeError:
        return False
    return True


def _problem(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"detail": sentence}, status)


Line = dict[str, Any]  # of the log
Format = Callable[[Line], str]


def as_text(line: Line) -> str:
    """For people: `2026-11-30T16:41:07.120+00:00 127.0.0.1 GET "/v1/items" 200 1.52 ms 5f0c2a9be1d34788`."""
    path = json.dumps(line["path"])  # a line break in a path makes no second line
    text = "{time} {client} {method} {path} {status} {ms} ms {id}".format(**line | {"path": path})
    return f"{text} {line['variant']}" if "variant" in line else text


LOG_FORMATS: dict[str, Format] = {"json": json.dumps, "text": as_text}
_current: ContextVar["Exchange"] = ContextVar("exchange")


def current_exchange() -> "Exchange":
    """The one that this task answers."""
    return _current.get()


class Exchange:
    """One request and its answer, as they pass the gate."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: bytes) -> None:
        self.scope = scope
        self._receive = receive
        self._send = send
        self.id = request_id
        self.start = time.perf_counter()
        self.status = 499  # the client hung up before an answer began
        self.has_hung_up = False
        self.variant: str | None = None  # that answered it, if there are several
        self._limit = MAX_BATCH_BODY if scope["path"] in (BATCH, EVENTS) else MAX_BODY
        self._received = 0  # bytes of the body
        self.is_read = scope["method"] in ("GET", "HEAD")  # whether its whole body has been read
        self.task = asyncio.current_task()

    async def receive(self) -> Message:
        message = await self._receive()
        self._received += len(message.get("body", b""))
        if self._received > self._limit:
            raise HTTPException(
                413, f"the body is too long: at most {self._limit:,} bytes are read"
            )
        self.is_read = self.is_read or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.id)]
        await self._send(message)

    async def cancel_if_hung_up(self) -> None:
        if (
            self.is_read
            and self.task
            and await Request(self.scope, self._receive).is_disconnected()
        ):
            self.has_hung_up = True
            self.task.cancel()

    def log(self) -> Line:
        """Counts the request, and returns its line of the log."""
        seconds = time.perf_counter() - self.start
        address = self.scope.get("address") or getattr(self.scope.get("route"), "path", "other")
        REQUESTS.labels(address, self.status).inc()
        REQUEST_SECONDS.labels(address).observe(seconds)
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": self.id.decode(),
            "client": (self.scope.get("client") or ("",))[0],
            "method": self.scope["method"],
            "path": self.scope["path"][:MAX_URL],
            "status": self.status,
            "ms": round(seconds * 1000, 2),
        }
        if self.variant is not None:
            line["variant"] = self.variant
        return line


class Gate:
    """The application behind the gate, an ASGI application itself."""

    def __init__(self, app: ASGIApp, tokens: Tokens, access_log: Format | None = None) -> None:
        self._app = app
        self._tokens = tokens
        self._format = access_log
        self._open: set[Exchange] = set()
        self._lines: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the server's lifespan
            return await self._live(scope, receive, send)
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = os.urandom(8).hex().encode()
        exchange = Exchange(scope, receive, send, request_id)
        self._open.add(exchange)
        _current.set(exchange)
        try:
            refusal = malformed(scope, headers) or self._tokens.refusal(
                scope["path"], headers.get(b"authorization", b"")
            )
            app = refusal or self._app
            await app(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:
            if not exchange.has_hung_up:
                raise
            HUNG_UP.inc()
        finally:
            self._open.remove(exchange)
            line = exchange.log()
            if self._format is not None:
                self._lines.append(self._format(line) + "\n")

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        watching = asyncio.create_task(self._watch())
        try:
            await self._app(scope, receive, send)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            self._flush()

    async def _watch(self) -> None:
        """Forever: drops the requests of clients that have hung up, and writes the log."""
        while True:
            await asyncio.sleep(TICK)
            for exchange in [
                each for each in self._open if time.perf_counter() - each.start > TICK
            ]:
                await exchange.cancel_if_hung_up()
            self._flush()

    def _flush(self) -> None:
        """Writes the lines of the log that are new."""
        print(*self._lines, sep="", end="", flush=True)
        self._lines.clear()
