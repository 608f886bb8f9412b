"""What goes over the wire: requests with their limits, answers, and errors, each of them one sentence."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

LOWEST = -3.4028234663852886e38  # float32's lowest: the bundles' score of an empty place
MAX_BODY = 128 * 1024  # bytes: room for the longest history and exclusions with UUIDs as ids
MAX_BATCH, MAX_BATCH_BODY = 100, 1024 * 1024  # requests, and their bytes, in a body of /v1/recommend/batch

Id = Annotated[str, Field(max_length=512)]
Ids = Annotated[list[Id], Field(max_length=1000)]
EXAMPLES: list[Any] = [
    {"user_id": "u7", "k": 3},
    {"history": ["i1", "i2"], "k": 3, "exclude": ["i5"], "filter": {"genres": ["Comedy"]}, "explain": True},
]


class RecommendRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": EXAMPLES})

    user_id: Id | None = Field(default=None, description="Absent, null, empty or unknown: an anonymous user.")
    history: Ids | None = Field(
        default=None, description="Items, oldest first, instead of the stored history; unknown ids are ignored."
    )
    k: int = Field(default=10, ge=1, description="How many items; at most max_k of /v1/models.")
    exclude: Ids = Field(default=[], description="Items that must not be in the answer.")
    filter: dict[Id, list[str | int | float | bool]] = Field(
        default={}, description="{column: [values]}: items with one of the values (a list: in it), in every column."
    )
    explain: bool = Field(default=False, description="Say of each item where it comes from.")


class BatchRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"requests": EXAMPLES}]})

    requests: list[RecommendRequest] = Field(min_length=1, max_length=MAX_BATCH)


class Nearest(BaseModel):
    item_id: str
    title: str | None = None
    similarity: float = Field(description="Cosine of the two items' vectors.")


class Explanation(BaseModel):
    retrieval_rank: int | None = Field(
        description="Place in retrieval's order, 1 = first, among the items that pass where the filter is narrow; null"
        " for an item that fills up."
    )
    retrieval_score: float | None
    ranking_score: float | None = Field(description="Null without a ranker, and for what it has not ranked.")
    nearest: Nearest | None = Field(description="The item of the history that is most like this one.")


class Item(BaseModel):
    """An item: its id, its score, and the columns of items.parquet, null where there is no value."""

    model_config = ConfigDict(extra="allow")

    item_id: str
    score: float | None = Field(default=None, description="Null where the models have not scored the item.")
    explain: Explanation | None = None


Versions = Annotated[dict[str, int], Field(description="The versions that answered, by stage.")]


class Recommendations(BaseModel):
    user_id: str | None
    items: list[Item]
    cold_start: bool = Field(description="Nothing is known of the user: these are the popular items.")
    model: Versions
    history: list[Item] | None = Field(
        default=None, description="With explain: what the answer rests on, oldest first."
    )


class Batch(BaseModel):
    answers: list[Recommendations] = Field(description="In the order of the requests.")


class Similar(BaseModel):
    item_id: str
    items: list[Item]
    model: Versions


class Found(BaseModel):
    items: list[Item]


class History(BaseModel):
    user_id: str
    items: list[Item] = Field(description="What the bundle stores, oldest first.")


class Users(BaseModel):
    users: list[str]


class Models(BaseModel):
    models: dict[str, dict[str, Any]] = Field(description="By stage: the version, where it comes from, its metrics.")
    catalogue: dict[str, Any]
    max_k: int
    failed: dict[str, Any] | None = Field(description="The bundles that could not be taken into service, and why.")


class Problem(BaseModel):
    detail: str = Field(description="One sentence: what is wrong.")


class UnavailableError(Exception):
    """What answers cannot do so now: 503 with this sentence."""
