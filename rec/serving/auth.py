"""The gate in front of the API: tokens, and the size of a request's body.

- REC_API_TOKENS (or API_TOKENS) open /v1/*; REC_ADMIN_TOKENS open that and the reload, which is closed without them.
  Comma-separated, from the environment or `.env` (the environment wins); sent as `Authorization: Bearer TOKEN`.
- Without API tokens /v1/* is open to all; with `required` everything but the health checks is closed to all.

Not covered: users, scopes, rate limits, TLS. Those belong to the proxy in front.
"""

import hmac
import os
from dataclasses import dataclass

from dotenv import dotenv_values
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rec.serving.schemas import MAX_BODY

HEALTH = ("/healthz", "/readyz")
RELOAD = "/v1/models/reload"


@dataclass(frozen=True)
class Tokens:
    api: tuple[str, ...] = ()
    admin: tuple[str, ...] = ()
    required: bool = False

    @classmethod
    def from_environment(cls, required: bool) -> "Tokens":
        values = {**dotenv_values(".env", interpolate=False), **os.environ}
        api, fallback, admin = (
            tuple(token.strip() for token in (values.get(name) or "").split(",") if token.strip())
            for name in ("REC_API_TOKENS", "API_TOKENS", "REC_ADMIN_TOKENS")
        )
        return cls(api or fallback, admin, required)

    def refusal(self, path: str, authorization: str) -> JSONResponse | None:
        """The answer to a request that may not pass, or None."""
        closed = self.required or bool(self.api and f"{path}/".startswith("/v1/"))
        if path in HEALTH or not (closed or path == RELOAD):
            return None
        accepted = self.admin if path == RELOAD else self.admin + self.api
        if not accepted:
            return JSONResponse({"detail": "this server was started without the tokens that open this address"}, 403)
        scheme, _, token = authorization.partition(" ")
        sent = token.strip().encode("latin-1")  # a header's bytes; tokens are UTF-8
        equal = [hmac.compare_digest(sent, known.encode()) for known in accepted]  # all of them: time tells nothing
        if scheme.lower() == "bearer" and any(equal):
            return None
        sentence = "this address needs the header Authorization: Bearer TOKEN, with a valid token"
        return JSONResponse({"detail": sentence}, 401, {"WWW-Authenticate": "Bearer"})


class Gate:
    """ASGI middleware: refuses requests without a valid token, and bodies of more than MAX_BODY bytes."""

    def __init__(self, app: ASGIApp, tokens: Tokens) -> None:
        self.app, self.tokens = app, tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        refusal = self.tokens.refusal(scope["path"], Headers(scope=scope).get("authorization", ""))
        if refusal is not None:
            return await refusal(scope, receive, send)
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY:
                raise HTTPException(413, f"the body is too long: at most {MAX_BODY:,} bytes are read")
            return message

        await self.app(scope, bounded, send)
