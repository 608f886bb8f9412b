"""The application that `python -m rec.serve` runs: rec/serving/app.py behind the gate, with /metrics and the reload."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Scope

from rec.errors import UserError
from rec.ops.serving import metrics
from rec.ops.serving.gate import RELOAD, Format, Gate, Tokens
from rec.ops.serving.shortcut import Shortcut
from rec.serving.answer import Backend
from rec.serving.app import PROBLEMS, create_app
from rec.serving.service import Service

Reload = Callable[
    [], dict[str, int]
]  # returns the new versions; raises UserError if the old ones stay


def never_reload() -> dict[str, int]:
    raise UserError("this process loads its bundles once")


def guarded_app(
    service: Service,
    tokens: Tokens,
    reload: Reload = never_reload,
    origins: tuple[str, ...] = (),
    access_log: Format | None = None,
    more: Sequence[APIRouter] = (),
) -> ASGIApp:
    """The application of a service.

    Args:
      origins: of pages elsewhere whose scripts may call the API (CORS).
      access_log: makes a line per request for stdout. None: no lines.
      more: further addresses.
    """
    app = create_app(service, operations(reload), *more)
    gate = Gate(Shortcut(app, service), tokens, access_log)
    if not origins:
        return gate
    return CORSMiddleware(gate, origins, allow_methods=["*"], allow_headers=["*"])


def describe() -> dict[str, Any]:
    """The OpenAPI schema, without any models."""
    return create_app(Service(_load_nothing), operations(never_reload)).openapi()


def _load_nothing() -> Backend:
    raise UserError("this application only describes itself")


def operations(reload: Reload) -> APIRouter:
    """What those who operate the server ask for."""
    router = APIRouter(lifespan=answer_first)

    @router.post(RELOAD, responses=PROBLEMS)
    async def reload_models() -> Response:
        """Loads what the server's references now mean, such as a new latest version (admin token)."""
        try:
            versions = await asyncio.to_thread(reload)
        except UserError as error:
            raise HTTPException(409, f"the models stay as they are: {error}") from error
        return JSONResponse({"model": versions})

    @router.get("/metrics", response_class=PlainTextResponse, responses=PROBLEMS)
    def prometheus() -> Response:
        """Numbers for Prometheus."""
        return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    return router


@asynccontextmanager
async def answer_first(app: FastAPI) -> AsyncIterator[None]:
    """Sends the application its first requests before it listens.

    FastAPI and the metrics make what they need at their first request. That takes up to 80 ms, in which this process
    would answer nobody.
    """
    for path in ("/healthz", "/metrics"):
        scope: Scope = {
            "type": "http",
            "method": "GET",
            "path": path,
            "query_string": b"",
            "headers": [],
        }
        await app(scope, _no_body, _drop)
    yield


async def _no_body() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _drop(message: Message) -> None:
    """Nobody reads the answer."""
