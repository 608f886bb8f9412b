"""Recommendations for many users as one file: Parquet, CSV or JSON lines.

    write_recommendations(engine, Path("ids.txt"), Path("recs.parquet"), RecommendRequest(k=50))

- One row per recommendation, users in the order of their file, each user's best item first. A user for whom nothing is
  left has no row.
- Users are answered in parts of PART, each written to OUTPUT.parts/ and renamed when it is complete. A run that was
  killed goes on behind the last part. If the bundles, the users or the options have changed, it starts over.
- Memory holds one part. The disk holds all parts and the file, which is made of them at the end.

Not covered: several machines. Split the file of users instead.
"""

import gc
import json
import os
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

import rec
from rec import LOWEST
from rec.bundles.files import read_lines
from rec.errors import UserError, note
from rec.files import digest, sole_writer
from rec.serving.answer import Engine
from rec.serving.schemas import RecommendRequest

PART = 10_000  # users
BATCH = 64  # users of one call of the models
FORMATS = {".parquet": "parquet", ".csv": "csv, header", ".jsonl": "json"}  # as DuckDB calls them
SCHEMA = pa.schema(
    {
        "user_id": pa.string(),
        "rank": pa.int32(),
        "item_id": pa.string(),
        "score": pa.float32(),
        "cold_start": pa.bool_(),
    }
)
Json = dict[str, object]


def write_recommendations(
    engine: Engine, users: Path, output: Path, request: RecommendRequest
) -> Json:
    """Writes the answers to every user of a file with one id per line.

    Args:
      request: the options for all of them.

    Returns:
      The command's JSON.

    Raises:
      UserError: the ending of `output` is not one of FORMATS, `users` cannot be read, the request does not fit the
        bundles, or another process writes the same file.
    """
    if output.suffix not in FORMATS:
        raise UserError(f"{output}: the name must end in {', '.join(FORMATS)}")
    engine.check_request(request)
    start = time.perf_counter()
    count = _count_users(users)
    with sole_writer(output):
        parts = _open_parts(output, _identity(engine, users, request))
        before = PART * len(_list(parts))
        answered = max(count - before, 0)
        gc.freeze()  # a collection would look at the whole catalogue: half a second, every 7,000 users
        try:
            _write_parts(engine, users, count, parts, request)
        finally:
            gc.unfreeze()
        rows = _join(parts, output)
        shutil.rmtree(parts)
    seconds = time.perf_counter() - start
    return {
        "output": str(output),
        "users": count,
        "rows": rows,
        "seconds": round(seconds, 1),
        "users_per_second": round(answered / seconds),
    }


def read_users(path: Path) -> Iterator[str]:
    """The ids in a file, without empty lines."""
    for line in read_lines(path):
        user_id = line.removesuffix("\r")
        if user_id:
            yield user_id


def _count_users(path: Path) -> int:
    try:
        return sum(1 for _ in read_users(path))
    except UnicodeDecodeError:
        raise UserError(f"{path}: must be UTF-8 text with one user id per line") from None


def _identity(engine: Engine, users: Path, request: RecommendRequest) -> Json:
    """What the rows depend on."""
    return {
        "rec": rec.__version__,
        "bundles": {bundle.stage: bundle.id for bundle in engine.backend.metadata.bundles},
        "users": digest(users),
        "request": request.model_dump(mode="json"),
    }


def _open_parts(output: Path, identity: Json) -> Path:
    """The directory of the parts. Those of another run are removed."""
    parts = output.with_name(f"{output.name}.parts")
    named = parts / "run.json"
    if named.exists() and json.loads(named.read_text()) == identity:
        return parts
    if parts.exists():
        note(f"{parts} is from other bundles, users or options: starting over")
        shutil.rmtree(parts)
    parts.mkdir()
    named.with_suffix(".new").write_text(json.dumps(identity))
    os.replace(named.with_suffix(".new"), named)
    return parts


def _list(parts: Path) -> list[Path]:
    return sorted(parts.glob("*.parquet"))


def _write_parts(
    engine: Engine, users: Path, count: int, parts: Path, request: RecommendRequest
) -> None:
    """Writes the parts that are missing."""
    number = len(_list(parts))
    ids = islice(read_users(users), number * PART, None)
    answers = Answers(engine, request)
    with tqdm(total=count, initial=min(number * PART, count), unit="user") as progress:
        while part := list(islice(ids, PART)):
            tables = []
            for at in range(0, len(part), BATCH):
                batch = part[at : at + BATCH]
                tables.append(answers.of(batch))
                progress.update(len(batch))
            path = parts / f"{number:08}.parquet"
            pq.write_table(pa.concat_tables(tables), path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)
            number += 1


class Answers:
    """The answers to one request by any users, as tables of SCHEMA."""

    def __init__(self, engine: Engine, request: RecommendRequest) -> None:
        self._engine = engine
        self._request = request
        self._item_ids = pa.array(engine.catalogue.ids, pa.string())

    def of(self, users: list[str]) -> pa.Table:
        """The answers to a batch of users."""
        requests = [self._request.model_copy(update={"user_id": user_id}) for user_id in users]
        table = None
        if self._engine.is_plain(self._request):
            table = self._first(users, requests)
        return self._chosen(users, requests) if table is None else table

    def _first(self, users: list[str], requests: list[RecommendRequest]) -> pa.Table | None:
        """What the models find, if it is enough for everyone, without a Python object per item."""
        n = len(users)
        found = self._engine.find(requests)
        rows = found.rows[:, : self._request.k]
        scores = found.scores[:, : self._request.k]
        if (rows < 0).any():
            return None
        places = np.arange(1, rows.shape[1] + 1)
        return self._table(
            users=np.repeat(np.arange(n), len(places)),
            ids=pa.array(users, pa.string()),
            ranks=np.tile(places, n),
            rows=rows.ravel(),
            scores=scores.ravel(),
            cold=np.repeat(found.cold, len(places)),
        )

    def _chosen(self, users: list[str], requests: list[RecommendRequest]) -> pa.Table:
        """What the engine chooses for each user."""
        choices = list(self._engine.choose(requests))
        counts = [len(choice.places) for choice in choices]
        places = [place for choice in choices for place in choice.places]
        scores = [LOWEST if place.score is None else place.score for place in places]
        return self._table(
            users=np.repeat(np.arange(len(users)), counts),
            ids=pa.array(users, pa.string()),
            ranks=np.concatenate([np.arange(1, count + 1) for count in counts]),
            rows=np.array([place.row for place in places], int),
            scores=np.array(scores, np.float32),
            cold=np.repeat([choice.cold for choice in choices], counts),
        )

    def _table(
        self,
        users: np.ndarray,
        ids: pa.Array,
        ranks: np.ndarray,
        rows: np.ndarray,
        scores: np.ndarray,
        cold: np.ndarray,
    ) -> pa.Table:
        """A row per recommendation; `users` are places in `ids`, and a score of LOWEST is none."""
        columns = [
            ids.take(pa.array(users)),
            pa.array(ranks, pa.int32()),
            self._item_ids.take(pa.array(rows)),
            pa.array(scores, pa.float32(), mask=scores == LOWEST),
            pa.array(cold),
        ]
        return pa.table(columns, schema=SCHEMA)


def _join(parts: Path, output: Path) -> int:
    """Makes the file of the parts. Returns the number of its rows. Raises UserError if the disk is full."""
    paths = [str(path) for path in _list(parts)]
    new = parts / "joined"
    quoted = str(new).replace("'", "''")
    with duckdb.connect() as con:
        rows = con.read_parquet(paths) if paths else con.from_arrow(SCHEMA.empty_table())
        rows.create_view("recommendations")
        try:
            con.execute(f"copy recommendations to '{quoted}' (format {FORMATS[output.suffix]})")
        except duckdb.IOException as error:
            raise UserError(f"{output} cannot be written: {error}") from None
        (count,) = con.fetchall()[0]
    os.replace(new, output)
    return int(count)
