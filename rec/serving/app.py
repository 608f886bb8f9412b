"""The FastAPI application: addresses, and errors, each of them {"detail": "one sentence"}.

    service = Service(lambda: Recommender.load(*find_pair(Path("savedmodels"))))
    service.load()
    uvicorn.run(create_app(service))

The stack trace of a failure goes to the log and nowhere else. `response_model` documents the answers in /docs; a test
compares the two, and nothing is validated on the way out.

Not covered: tokens, limits, metrics, several processes and new bundles. `python -m rec.serve` adds them from
rec/ops/serving/.
"""

import difflib
from pathlib import Path as FilePath
from typing import Annotated, Any, get_type_hints

import orjson
from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException

import rec
from rec.bundles.metadata import metadata_to_json
from rec.errors import UserError
from rec.serving import schemas
from rec.serving.schemas import BatchRequest, Problem, RecommendRequest
from rec.serving.service import Service

SHOWN = (
    "version",
    "id",
    "architecture",
    "metrics",
    "index",
    "built_from",
    "dataset",
    "created",
    "libraries",
)
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def create_app(service: Service, *more: APIRouter) -> FastAPI:
    """The application. It answers /v1/* with 503 until the service has loaded its models. `more` adds addresses."""
    app = FastAPI(
        title="rec",
        version=rec.__version__,
        summary="Recommendations",
        redirect_slashes=False,
        exception_handlers={
            HTTPException: refused,
            UserError: refused,
            RequestValidationError: _invalid,
            Exception: failed,
        },
    )
    app.state.service = service
    for router in (v1, around, *more):
        app.include_router(router)
    return app


async def _service(request: Request) -> Service:
    return request.app.state.service


class AnyText(Convertor[str]):
    """A part of an address that may hold line breaks: an id is taken as it is, in an address as in a body."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("path", AnyText())  # in place of Starlette's, which ends at a line break


class Json(Response):
    """By orjson: 10 items and their dictionaries take 8 microseconds; JSON that was joined as text took 27."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


# ------------------------------------------------------------------------------------------------------------
# Addresses

Serving = Annotated[Service, Depends(_service)]
InPath = Annotated[str, Path(min_length=1, max_length=512)]  # may hold slashes, plain or as %2F
K = Annotated[int, Query(ge=1, description="How many items; at most max_k of /v1/models.")]
Limit = Annotated[int, Query(ge=1, le=100)]

REFUSALS = (400, 401, 403, 404, 408, 409, 413, 414, 422, 431, 503)
PROBLEMS: dict[int | str, dict[str, Any]] = {status: {"model": Problem} for status in REFUSALS}
v1 = APIRouter(prefix="/v1", responses=PROBLEMS)
around = APIRouter(responses={status: PROBLEMS[status] for status in (401, 403, 503)})


@v1.post("/recommend", response_model=schemas.Recommendations)
async def recommend(body: RecommendRequest, service: Serving) -> Response:
    """Recommendations from a history, for a user, or both; without what is excluded, within a filter."""
    engine = service.ready
    engine.check_request(body)
    return Json(*await service.ask(engine.recommend, body))


@v1.get("/users/{user_id:path}/recommendations", response_model=schemas.Recommendations)
async def recommend_to_user(user_id: InPath, service: Serving, k: K = 10) -> Response:
    """Recommendations from a user's stored history; the popular items for an unknown user."""
    return await recommend(RecommendRequest(user_id=user_id, k=k), service)


@v1.post("/recommend/batch", response_model=schemas.Batch)
async def recommend_to_many(body: BatchRequest, service: Serving) -> Response:
    """As /v1/recommend for up to 100 requests, all answered by the same models."""
    await service.wait_for_room(len(body.requests))
    engine = service.ready
    for request in body.requests:
        engine.check_request(request)
    return Json({"answers": await service.ask(engine.recommend, *body.requests)})


@v1.get("/items/{item_id:path}/similar", response_model=schemas.Similar)
async def similar(item_id: InPath, service: Serving, k: K = 10) -> Response:
    """The items nearest to an item; their score is the cosine of the two."""
    engine = service.ready
    engine.check(k)
    if item_id not in engine.catalogue.row_of:
        raise HTTPException(404, f"there is no item {item_id[:64]!r}")
    return Json(*await service.ask(engine.similar, (item_id, k)))


@v1.get("/items", response_model=schemas.Items)
def find_items(
    service: Serving, q: Annotated[str, Query(max_length=100)] = "", limit: Limit = 20
) -> Response:
    """The most popular items with this text in their title (without titles: in their id), in upper or lower case."""
    catalogue = service.ready.catalogue
    return Json({"items": [catalogue.show(row) for row in catalogue.find(q, limit)]})


@v1.get("/users")
async def known_users(service: Serving, limit: Limit = 20) -> Response:
    """Some of the users that the models know."""
    return JSONResponse({"users": list(service.ready.backend.users[:limit])})


@v1.get("/users/{user_id:path}/history", response_model=schemas.Items)
async def history(user_id: InPath, service: Serving) -> Response:
    """What the models know of a user: nothing, if they do not know the user."""
    return Json(*await service.ask(service.ready.histories, user_id))


@v1.get("/models")
async def models(service: Serving) -> Response:
    """What answers: each stage's bundle, the largest k, the columns for filters, and what could not be loaded."""
    engine = service.ready
    shown = {}
    for bundle in engine.backend.metadata.bundles:
        content = metadata_to_json(bundle)
        shown[bundle.stage] = {key: content[key] for key in SHOWN if key in content}
    catalogue = {"items": len(engine.catalogue.ids), "columns": engine.catalogue.columns}
    answer = {
        "models": shown,
        "catalogue": catalogue,
        "max_k": engine.max_k,
        "failed": service.failed,
    }
    return Json(answer)


@around.get("/healthz")
async def healthz() -> Response:
    """The process is up."""
    return JSONResponse({"status": "ok"})


@around.get("/readyz")
async def readyz(service: Serving) -> Response:
    """The models are loaded and warm."""
    return JSONResponse({"status": "ready", "model": service.ready.versions})


@around.get("/", include_in_schema=False)
def page() -> Response:
    """The demo page."""
    html = FilePath(__file__).with_name("ui.html").read_bytes()
    return Response(html, 200, PAGE_HEADERS, "text/html; charset=utf-8")


# ------------------------------------------------------------------------------------------------------------
# Errors

SENTENCES = {  # instead of the framework's two words
    "Not Found": "there is nothing at this address; /docs lists what there is",
    "Method Not Allowed": "this address does not take that method; the header Allow names those it takes",
}
UNREADABLE = {  # why Python could not read a body as JSON
    RecursionError: "the body is nested too deeply",
    UnicodeDecodeError: "the body is not UTF-8 text",
    ValueError: "the body has a whole number with more digits than can be read",
}


async def refused(_: Request | None, error: Any) -> JSONResponse:
    if isinstance(error, UserError):
        return JSONResponse({"detail": str(error)}, 422)
    sentence = SENTENCES.get(error.detail) or UNREADABLE.get(type(error.__cause__))
    return JSONResponse({"detail": sentence or error.detail}, error.status_code, error.headers)


async def _invalid(request: Request, error: Any) -> JSONResponse:
    """The first thing that is wrong with a request."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = f"{first['ctx']['error']} at character {first['loc'][1]}"
        return JSONResponse({"detail": f"the body is not JSON: {reason}"}, 400)
    if first["type"] == "extra_forbidden":
        return JSONResponse({"detail": _unknown_key(request, first["loc"][1:])}, 422)
    return JSONResponse({"detail": _sentence(first)}, 422)


def _unknown_key(request: Request, place: tuple[str | int, ...]) -> str:
    body = get_type_hints(request.scope["route"].endpoint)["body"]
    schema = body.model_json_schema()
    objects = (schema, *schema.get("$defs", {}).values())
    known = [name for each in objects for name in each["properties"]]
    key = str(place[-1])[:64]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
    return f"{key!r}: unknown key; did you mean {near}?"


def _sentence(error: dict[str, Any]) -> str:
    """What pydantic says, with its place. What it quotes is cut short, and escaped by repr."""
    place = error["loc"][1:4]  # without the type of a union
    if not place:
        return "the body must be a JSON object, sent with the header Content-Type: application/json"
    where = "".join(f"[{at if isinstance(at, int) else at[:64]!r}]" for at in place[1:])
    message = error["msg"]
    return f"{place[0]}{where}: {message[0].lower()}{message[1:]}"


async def failed(_: Request | None, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": "the server failed to answer; its log says why"}, 500)
