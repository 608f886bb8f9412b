"""The FastAPI application: addresses, errors, and the one thread that calls the models.

- TensorFlow never blocks the event loop: all answers are made in one worker thread, a request at a time.
- Every error is {"detail": "one sentence"}; the stack trace of a failure goes to the log and nowhere else.
- A reload loads and warms the new pair beside the old one, then replaces it in one step; until then, and if it
  fails, the old one answers.

Not covered: several processes (start one a port, behind a proxy); batches of requests that wait for each other.
"""

import asyncio
import difflib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import rec
from rec.errors import UserError
from rec.recommender import Recommender
from rec.serving.answer import Engine, as_json
from rec.serving.auth import RELOAD, Gate, Tokens
from rec.serving.schemas import Problem, Recommendations, RecommendRequest, Similar

SHOWN = ("version", "id", "architecture", "metrics", "index", "built_from", "dataset", "created", "libraries")


class Service:
    """The engine that answers, the thread that it answers in, and how to load the next one."""

    def __init__(self, load: Callable[[], Recommender]) -> None:
        """`load` loads what its references mean when it is called, or raises UserError."""
        self._load, self._reloading = load, asyncio.Lock()
        self.engine: Engine | None = None
        self.thread = ThreadPoolExecutor(1, "model")

    @property
    def ready(self) -> Engine:
        if self.engine is None:
            raise HTTPException(503, "the models are being loaded: try again in a few seconds", {"Retry-After": "2"})
        return self.engine

    def load(self) -> None:
        self.engine = Engine.warm(self._load())

    async def reload(self) -> None:
        """Raises UserError if another reload is under way or this one fails."""
        if self._reloading.locked():
            raise UserError("another reload is under way")
        async with self._reloading:
            await run_in_threadpool(self.load)  # not in the models' thread, which goes on answering

    async def recommend(self, request: RecommendRequest) -> JSONResponse:
        engine = self.ready
        engine.check(request.k, request.filter)
        [answer] = await self.call(engine.answer, [request])
        return JSONResponse(answer)

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.thread, function, *args)


def create_app(service: Service, tokens: Tokens) -> FastAPI:
    """The application; it answers /v1/* with 503 until the service has loaded its engine."""
    app = FastAPI(title="rec", version=rec.__version__, summary="Recommendations", redirect_slashes=False)
    app.state.service = service
    app.include_router(health)
    app.include_router(v1)
    app.add_middleware(Gate, tokens=tokens)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(UserError, _invalid)
    app.add_exception_handler(Exception, _failed)
    return app


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


# ------------------------------------------------------------------------------------------------------------
# Addresses

Serving = Annotated[Service, Depends(_service)]
InPath = Annotated[str, Path(min_length=1, max_length=512)]  # may hold slashes, as they are or as %2F
K = Annotated[int, Query(ge=1, description="How many items; at most max_k of /v1/models.")]

PROBLEMS: dict[int | str, dict[str, Any]] = {s: {"model": Problem} for s in (400, 401, 403, 404, 409, 413, 422, 503)}
health = APIRouter(responses={503: PROBLEMS[503]})
v1 = APIRouter(prefix="/v1", responses=PROBLEMS)


@health.get("/healthz")
async def healthz() -> JSONResponse:
    """The process is up."""
    return JSONResponse({"status": "ok"})


@health.get("/readyz")
async def readyz(service: Serving) -> JSONResponse:
    """The models are loaded and warm."""
    return JSONResponse({"status": "ready", "model": service.ready.recommender.versions()})


@v1.get("/users/{user_id:path}/recommendations", response_model=Recommendations)
async def recommend_to_user(user_id: InPath, service: Serving, k: K = 10) -> JSONResponse:
    """Recommendations from a user's stored history; the popular items for an unknown user."""
    return await service.recommend(RecommendRequest(user_id=user_id, k=k))


@v1.post("/recommend", response_model=Recommendations)
async def recommend(body: RecommendRequest, service: Serving) -> JSONResponse:
    """Recommendations from a history, for a user, or both; without what is excluded, within a filter."""
    return await service.recommend(body)


@v1.get("/items/{item_id:path}/similar", response_model=Similar)
async def similar(item_id: InPath, service: Serving, k: K = 10) -> JSONResponse:
    """The items nearest to an item; their score is the cosine of the two."""
    engine = service.ready
    engine.check(k)
    if item_id not in engine.catalogue.row_of:
        raise HTTPException(404, f"there is no item {item_id[:64]!r}")
    return JSONResponse(await service.call(engine.similar, item_id, k))


@v1.get("/models")
async def models(service: Serving) -> JSONResponse:
    """What answers: each stage's bundle, the largest k, and the columns that a filter can name."""
    engine = service.ready
    stages = engine.recommender.metadata.items()
    found = {stage: {key: metadata[key] for key in SHOWN if key in metadata} for stage, metadata in stages}
    catalogue = {"items": len(engine.catalogue.ids), "columns": list(engine.catalogue.columns)}
    return JSONResponse({"models": as_json(found), "catalogue": catalogue, "max_k": engine.max_k})


@v1.post(RELOAD.removeprefix("/v1"))
async def reload(service: Serving) -> JSONResponse:
    """Loads what the server's references now mean, such as a new latest version (admin token)."""
    try:
        await service.reload()
    except UserError as error:
        raise HTTPException(409, f"the models stay as they are: {error}") from error
    return JSONResponse({"model": service.ready.recommender.versions()})


# ------------------------------------------------------------------------------------------------------------
# Errors

SENTENCES = {  # in place of the framework's two words
    "Not Found": "there is nothing at this address; /docs lists what there is",
    "Method Not Allowed": "this address does not take that method; the header Allow names those it takes",
}


async def _refused(_: Request, error: Any) -> JSONResponse:
    return JSONResponse({"detail": SENTENCES.get(error.detail, error.detail)}, error.status_code, error.headers)


async def _invalid(_: Request, error: Any) -> JSONResponse:
    """The first thing that is wrong with a request. What is quoted from it is cut short, and escaped by repr."""
    if isinstance(error, UserError):
        return JSONResponse({"detail": str(error)}, 422)
    first = error.errors()[0]
    kind, message, place = first["type"], first["msg"], first["loc"][1:4]  # without the type of a union
    if kind == "json_invalid":
        return JSONResponse({"detail": f"the body is not JSON: {first['ctx']['error']} at character {place[0]}"}, 400)
    if not place:
        sentence = "the body must be a JSON object, sent with the header Content-Type: application/json"
    elif kind == "extra_forbidden":
        nearest = difflib.get_close_matches(place[0][:64], RecommendRequest.model_fields, n=1, cutoff=0.0)[0]
        sentence = f"{place[0][:64]!r}: unknown key; did you mean {nearest}?"
    else:
        where = "".join(f"[{at if isinstance(at, int) else at[:64]!r}]" for at in place[1:])
        sentence = f"{place[0]}{where}: {message[0].lower()}{message[1:]}"
    return JSONResponse({"detail": sentence}, 422)


async def _failed(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": "the server failed to answer; its log says why"}, 500)
