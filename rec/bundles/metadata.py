"""metadata.json: what a bundle says about itself. `read_metadata` reads it, `write_metadata` writes it.

A bundle of rec 0.1 is read too. A file that this version cannot read is refused in one sentence.
"""

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from rec.config import Config, first_problem
from rec.errors import UserError
from rec.files import digest

LENIENT = ConfigDict(extra="ignore")  # another version may have written more
OPTIONAL = ("run", "history", "index")  # are left out of the file if they are None
ZERO_AS_AUTO = {"window", "epochs"}  # retrieval settings of rec 0.1

Json = dict[str, object]
Stage = Literal["retrieval", "ranking", "recommender"]


@dataclass(frozen=True)
class Reference:
    """A published bundle."""

    version: int
    id: str


@dataclass(frozen=True)
class Coverage:
    """What is in the stored histories."""

    until: int | None = None  # the time of the latest interaction; None without times
    events: tuple[str, ...] | None = None  # the kinds of interactions; None without kinds


@dataclass(frozen=True, kw_only=True, config=LENIENT)
class BundleMetadata:
    """What metadata.json says. Exporting sets what has a default."""

    stage: Stage
    version: int = 0
    id: str = ""  # a hash of all files
    run_id: str  # of the training run
    architecture: str
    dataset: str  # the id of the data set
    vocabulary: str = ""  # a hash of the item ids, in order
    metrics: dict[str, float]
    config: Config  # the one that the model was trained with
    built_from: dict[str, Reference]  # by stage
    run: Json | None = None  # the checkpoint's run.json; a recommender has none
    history: list[dict[str, float]] | None = None  # the metrics after each epoch
    covers: Coverage = Coverage()
    index: Json | None = None  # its kind and measured recall; a ranking bundle has none
    libraries: dict[str, str] = Field(default_factory=dict)  # {package: version}
    git_commit: str | None = None  # None outside a checkout
    command: str = ""
    created: str = ""
    files: dict[str, str] = Field(default_factory=dict)  # {path: sha256}

    @property
    def reference(self) -> Reference:
        return Reference(self.version, self.id)

    @property
    def excludes_seen(self) -> bool:
        """Whether it leaves out what a user has met; a bundle that does not say so does."""
        return self.config.index.exclude_seen is not False


@dataclass(frozen=True)
class PairMetadata:
    """A retrieval bundle and, if there is one, the ranking bundle that re-ranks what it retrieves."""

    retrieval: BundleMetadata
    ranking: BundleMetadata | None = None

    @property
    def bundles(self) -> list[BundleMetadata]:
        return [self.retrieval] if self.ranking is None else [self.retrieval, self.ranking]

    @property
    def versions(self) -> dict[str, int]:
        """The version of each stage."""
        return {bundle.stage: bundle.version for bundle in self.bundles}

    @property
    def candidates(self) -> int | None:
        """The number of retrieved items that are ranked; None without a ranker."""
        return None if self.ranking is None else self.ranking.config.ranking.candidates

    @property
    def predicts_ratings(self) -> bool:
        """Whether the scores are ratings."""
        return self.ranking is not None and self.ranking.config.ranking.objective == "rating"


_METADATA = TypeAdapter(BundleMetadata)


def read_metadata(bundle: Path, stage: str | None = None) -> BundleMetadata:
    """A bundle's metadata.json.

    Raises:
      UserError: the directory is not a bundle, or not one of `stage`; the file is damaged, has changed since the
        export, or is from a version of rec that this one cannot read.
    """
    path = bundle / "metadata.json"
    if not path.exists():
        raise UserError(
            f"{bundle} is not a bundle: it has no metadata.json (a bundle is SAVEDMODELS/STAGE/VERSION)"
        )
    try:
        content = json.loads(path.read_text())
        own_stage = content["stage"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: export the bundle again") from error
    if content.get("checksum") != checksum(content):
        raise UserError(f"{path} has changed since the export: export the bundle again")
    if stage not in (None, own_stage):
        raise UserError(f"{bundle} is a {own_stage} bundle, not a {stage} bundle")
    return parse_metadata(content, str(path))


def parse_metadata(content: Json, where: str) -> BundleMetadata:
    """The metadata in a file or at W&B, as `where` says. Raises UserError if this version of rec cannot read them."""
    match content:
        case {"config": {"retrieval": dict(settings), **sections}}:
            zeros = {name: "auto" for name in ZERO_AS_AUTO if settings.get(name) == 0}
            content = content | {"config": {**sections, "retrieval": settings | zeros}}
    try:
        return _METADATA.validate_json(json.dumps(content))
    except ValidationError as error:
        raise UserError(
            f"{where} is from another version of rec ({first_problem(error)}): export the bundle again"
        ) from None


def write_metadata(bundle: Path, metadata: BundleMetadata) -> None:
    """Writes metadata.json, with a checksum of it."""
    content = metadata_to_json(metadata)
    content["checksum"] = checksum(content)
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (bundle / "metadata.json").write_text(text)


def metadata_to_json(metadata: BundleMetadata) -> Json:
    """The metadata as they are in the file."""
    absent = {name for name in OPTIONAL if getattr(metadata, name) is None}
    content: Json = _METADATA.dump_python(metadata, mode="json", exclude=absent)
    return content


def checksum(content: Json) -> str:
    """A hash of all metadata except the checksum itself."""
    others = {key: value for key, value in content.items() if key != "checksum"}
    text = json.dumps(others, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def verify(bundle: Path, stage: str | None = None) -> BundleMetadata:
    """A bundle's metadata, after every file in it was compared with what was exported.

    Raises:
      UserError: as `read_metadata`, or a file is missing or has changed.
    """
    metadata = read_metadata(bundle, stage)
    for name, expected in metadata.files.items():
        if not (bundle / name).exists():
            raise UserError(f"{bundle} lacks {name}: export the bundle again")
        if digest(bundle / name) != expected:
            raise UserError(
                f"{bundle}/{name} has changed since the export: export the bundle again"
            )
    return metadata


def check_pair(retrieval: BundleMetadata, ranking: BundleMetadata, where: Path | str) -> None:
    """Raises UserError if the ranking bundle was not trained for this retrieval bundle."""
    expected = ranking.built_from["retrieval"]
    if expected != retrieval.reference:
        raise UserError(
            f"{where} was trained for retrieval version {expected.version}, not for version "
            f"{retrieval.version}: name a matching pair, or pass --allow-mismatch"
        )
