"""Requests with their limits, answers, and errors, which are one sentence each."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

MAX_BODY = 128 * 1024  # bytes: room for the longest history and exclusions with UUIDs as ids
MAX_BATCH = 100  # requests in a body of /v1/recommend/batch,
MAX_BATCH_BODY = 1024 * 1024  # and their bytes

Id = Annotated[str, Field(max_length=512)]
Ids = Annotated[list[Id], Field(max_length=1000)]
EXAMPLES: list[Any] = [
    {"user_id": "u7", "k": 3},
    {
        "history": ["i1", "i2"],
        "k": 3,
        "exclude": ["i5"],
        "filter": {"genres": ["Comedy"]},
        "explain": True,
    },
]


class RecommendRequest(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,  # Python reads NaN and Infinity, which are not JSON
        json_schema_extra={"examples": EXAMPLES},
    )

    user_id: Id | None = Field(
        default=None, description="Absent, null, empty or unknown: an anonymous user."
    )
    history: Ids | None = Field(
        default=None,
        description="Items, oldest first, instead of the stored history; unknown ids are ignored.",
    )
    recent: Ids = Field(
        default_factory=list,
        description="Items, oldest first, that come after the history, given or stored.",
    )
    k: int = Field(default=10, ge=1, description="How many items; at most max_k of /v1/models.")
    exclude: Ids = Field(default_factory=list, description="Items that must not be in the answer.")
    exclude_seen: bool | None = Field(
        default=None,
        description="Whether what the user has met is left out. Absent or null: as the bundle was made.",
    )
    filter: dict[Id, list[str | int | float | bool]] = Field(
        default_factory=dict,
        description="{column: [values]}: items with one of these (a list: in it) in every column.",
    )
    max_per: dict[Id, Annotated[int, Field(ge=1)]] | None = Field(
        default=None,
        description="{column: n}: at most n items per value (of a list: each value). Null: the bundle's index.max_per.",
    )
    diversity: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="0: the best items. 1: items unlike each other. Null: the bundle's index.diversity.",
    )
    explain: bool = Field(default=False, description="Say of each item where it comes from.")


class BatchRequest(BaseModel):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"requests": EXAMPLES}]}
    )

    requests: list[RecommendRequest] = Field(min_length=1, max_length=MAX_BATCH)


class Item(BaseModel):
    """An item: its id, its score, and the columns of items.parquet, null where there is no value."""

    model_config = ConfigDict(extra="allow")

    item_id: str
    score: float | None = Field(description="Null where the models have not scored the item.")
    explain: dict[str, Any] | None = Field(
        default=None,
        description="retrieval_rank (1 = first; among the items that pass where the filter is narrow), retrieval_score,"
        " ranking_score, and nearest: the item of the history that is most like it, with the cosine as similarity.",
    )


Versions = Annotated[dict[str, int], Field(description="The versions that answered, by stage.")]


class Items(BaseModel):
    items: list[Item]


class Recommendations(Items):
    user_id: str | None
    cold_start: bool = Field(
        description="Nothing is known of the user: these are the popular items."
    )
    model: Versions
    variant: str | None = Field(default=None, description="That answered, if there are several.")
    request_id: str | None = Field(default=None, description="For events that it leads to.")
    history: list[Item] | None = Field(
        default=None, description="With explain: what it rests on, oldest first."
    )


class Batch(BaseModel):
    answers: list[Recommendations] = Field(description="In the order of the requests.")


class Similar(Items):
    item_id: str
    model: Versions


class Problem(BaseModel):
    detail: str = Field(description="One sentence: what is wrong.")


class UnavailableError(Exception):
    """The models cannot answer now: 503 with this sentence."""
