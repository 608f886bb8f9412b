"""The gate in front of the API, in plain ASGI: request ids, tokens, the size of a body, hang-ups, metrics and the log.

- REC_API_TOKENS (or API_TOKENS) open /v1/*; REC_ADMIN_TOKENS open that and the reload, which is closed without them.
  Comma-separated, from the environment or `.env` (the environment wins); sent as `Authorization: Bearer TOKEN`.
- Without API tokens /v1/* is open to all; with `required` everything but the health checks is closed to all.
- A request whose client has hung up is cancelled, so that no model works for it.
- The log is a JSON line a request on stdout. An X-Request-ID is taken over and returned, or made up.

Not covered: users, scopes, rate limits, TLS. Those belong to the proxy in front.
"""

import asyncio
import hmac
import json
import os
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from dotenv import dotenv_values
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rec.serving.metrics import HUNG_UP, REQUEST_SECONDS, REQUESTS
from rec.serving.schemas import MAX_BATCH_BODY, MAX_BODY

HEALTH = ("/healthz", "/readyz")
PAGE, RELOAD, BATCH = "/", "/v1/models/reload", "/v1/recommend/batch"
TICK = 0.05  # seconds between looks for clients that have hung up, and between writes of the log
REQUEST_ID = re.compile(rb"[\w.:/+=-]{1,128}")


@dataclass(frozen=True)
class Tokens:
    api: tuple[str, ...] = ()
    admin: tuple[str, ...] = ()
    required: bool = False

    @classmethod
    def from_environment(cls, required: bool) -> "Tokens":
        values = {**dotenv_values(".env", interpolate=False), **os.environ}
        names = ("REC_API_TOKENS", "API_TOKENS", "REC_ADMIN_TOKENS")
        lists = [(values.get(name) or "").split(",") for name in names]
        api, fallback, admin = (
            tuple(token.strip() for token in each if token.strip()) for each in lists
        )
        return cls(api or fallback, admin, required)

    def refusal(self, path: str, authorization: bytes) -> JSONResponse | None:
        """The answer to a request that may not pass, or None."""
        closed = self.required or bool(self.api and f"{path}/".startswith("/v1/"))
        if path in HEALTH or not (closed or path == RELOAD) or (path == PAGE and self.api):
            return None  # the page has no data of its own: it asks for a token, and sends it with what it asks
        accepted = self.admin if path == RELOAD else self.admin + self.api
        if not accepted:
            return JSONResponse(
                {"detail": "this server was started without the tokens that open this address"}, 403
            )
        scheme, _, sent = authorization.partition(b" ")
        equal = [
            hmac.compare_digest(sent.strip(), known.encode()) for known in accepted
        ]  # all: time tells nothing
        if scheme.lower() == b"bearer" and any(equal):
            return None
        sentence = "this address needs the header Authorization: Bearer TOKEN, with a valid token"
        return JSONResponse({"detail": sentence}, 401, {"WWW-Authenticate": "Bearer"})


class Exchange:
    """One request and its answer, as they pass the gate."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: bytes) -> None:
        self.scope, self._receive, self._send, self.id = scope, receive, send, request_id
        self.start, self.status, self.gone = time.perf_counter(), 499, False
        self._limit, self._received = MAX_BATCH_BODY if scope["path"] == BATCH else MAX_BODY, 0
        self.is_read = scope["method"] in ("GET", "HEAD")  # its body is, or there is none
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

    async def cancel_if_gone(self) -> None:
        if (
            self.is_read
            and self.task
            and await Request(self.scope, self._receive).is_disconnected()
        ):
            self.gone = True
            self.task.cancel()

    def log(self) -> str:
        """Counts the request and says it in a line."""
        seconds = time.perf_counter() - self.start
        address = self.scope.get("address") or getattr(self.scope.get("route"), "path", "other")
        REQUESTS.labels(address, self.status).inc()
        REQUEST_SECONDS.labels(address).observe(seconds)
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": self.id.decode(),
            "client": (self.scope.get("client") or ("",))[0],
            "method": self.scope["method"],
            "path": self.scope["path"],
            "status": self.status,
            "ms": round(seconds * 1000, 2),
        }
        return json.dumps(line) + "\n"


class Gate:
    """The application behind the gate, an ASGI application itself."""

    def __init__(self, app: ASGIApp, tokens: Tokens, access_log: bool = False) -> None:
        self.app, self._tokens, self._access_log = app, tokens, access_log
        self._open: set[Exchange] = set()
        self._lines: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if REQUEST_ID.fullmatch(given) else os.urandom(8).hex().encode()
        exchange = Exchange(scope, receive, send, request_id)
        self._open.add(exchange)
        try:
            app = (
                self._tokens.refusal(scope["path"], headers.get(b"authorization", b"")) or self.app
            )
            await app(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:
            if not exchange.gone:
                raise
            HUNG_UP.inc()
        finally:
            self._open.remove(exchange)
            line = exchange.log()
            if self._access_log:
                self._lines.append(line)

    async def watch(self) -> None:
        """For ever: drops the requests of clients that have gone, and writes the log."""
        while True:
            await asyncio.sleep(TICK)
            for exchange in [
                each for each in self._open if time.perf_counter() - each.start > TICK
            ]:
                await exchange.cancel_if_gone()
            self.flush()

    def flush(self) -> None:
        """Writes the log of what was answered since the last time."""
        lines, self._lines = self._lines, []
        print(*lines, sep="", end="", flush=True)
