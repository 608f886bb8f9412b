"""What goes over the wire: requests with their limits, answers, and errors, each of them one sentence."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

MAX_BODY = 128 * 1024  # bytes: room for the longest history and exclusions with UUIDs as ids

Id = Annotated[str, Field(max_length=512)]
Ids = Annotated[list[Id], Field(max_length=1000)]
Items = Annotated[
    list[dict[str, Any]],
    Field(
        description="item_id, score, and the columns of items.parquet, null where there is no value. The score is null"
        " for a popular item that fills up an answer short of recommendations."
    ),
]
Versions = Annotated[dict[str, int], Field(description="The versions that answered, by stage.")]


class RecommendRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    user_id: Id | None = Field(default=None, description="Absent, null, empty or unknown: an anonymous user.")
    history: Ids | None = Field(
        default=None, description="Items, oldest first, instead of the stored history; unknown ids are ignored."
    )
    k: int = Field(default=10, ge=1, description="How many items; at most max_k of /v1/models.")
    exclude: Ids = Field(default=[], description="Items that must not be in the answer.")
    filter: dict[Id, list[str | int | float | bool]] = Field(
        default={}, description="{column: [values]}: items with one of the values (a list: in it), in every column."
    )


class Recommendations(BaseModel):
    user_id: str | None
    items: Items
    cold_start: bool = Field(description="Nothing is known of the user: these are the popular items.")
    model: Versions


class Similar(BaseModel):
    item_id: str
    items: Items
    model: Versions


class Problem(BaseModel):
    detail: str = Field(description="One sentence: what is wrong.")
