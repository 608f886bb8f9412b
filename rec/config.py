"""The configuration: strict YAML into frozen pydantic dataclasses. Every key is a field below, described under it.

- `load_config(path, ["retrieval.epochs=3"])` reads a file, then the `--set` overrides (values are YAML too).
- If the working directory has no such file, the one that comes with rec is read: `config/your_data.yaml` always works.
- An unknown, missing or repeated key, a wrong type, an impossible value: one sentence that names the file and the key.
- A key that has no effect, because another key or the data decide so: one sentence too (`without_effect`, `overruled`).
- `auto` means that the data or another key choose the value: see `with_data_defaults` and `with_ranking_defaults`.
- Every command with `--config` prints all keys with `--keys`.
- The loader knows no single key: a new field is a new key.

Not covered: the names of architectures, objectives and kinds of features. Their registries check them; they need
TensorFlow, which this file does not.
"""

import argparse
import difflib
import re
from collections.abc import Sequence
from dataclasses import asdict, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from rec.errors import UserError

# Whole numbers pass for numbers, lists for tuples; nothing else is converted.
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]
CountOr0 = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy takes
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Target = Annotated[float, Field(gt=0, le=1)]
Columns = Auto | dict[str, str]


def _list_to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Widths = Annotated[tuple[Count, ...], Field(min_length=1), BeforeValidator(_list_to_tuple)]


@dataclass(frozen=True, config=STRICT)
class Features:
    """Kinds: categorical, multi (a list, such as genres), numeric, text (title tokens), time (seconds since 1970) and
    vector (numbers, all alike)."""

    users: Columns = "auto"
    """Columns of users.parquet, {column: kind}. auto: all, each with the kind of its type. {}: none."""

    items: Columns = "auto"
    """Columns of items.parquet, as for users."""


@dataclass(frozen=True, config=STRICT)
class Retrieval:
    """The two towers and their training."""

    arch: str = "auto"
    """Query tower (rec/retrieval/encoders.py): two_tower, gru4rec, sasrec or autoencoder. auto: sasrec;
    autoencoder without timestamps. `rec.train --stage retrieval --model-arch A` is short for
    `--set retrieval.arch=A`."""

    embedding_dim: Count = 64
    """Width of the vectors of users and items."""

    taste_dim: Auto | CountOr0 = "auto"
    """Width of the taste part of a query, a matrix factorisation that validation data weigh against the towers
    (rec/retrieval/taste.py). 0: none. auto: 256, or less for a small catalogue."""

    layers: Count = 2
    """Transformer blocks or recurrent layers."""

    heads: Count = 2
    """Attention heads of sasrec."""

    dropout: Auto | Rate = "auto"
    """Share of the query tower's activations that a training step drops. auto: 0.2; 0.4 if histories are short (fewer
    than 20 interactions per user on average)."""

    window: Auto | Count = "auto"
    """Positions per training example, and the longest history that is read. auto: 50; without timestamps 1,000."""

    epochs: Auto | Count = "auto"
    """The most epochs; early stopping is on val/ndcg@10. auto: 12 to 100, for about 1,500 steps; for about 7,500 if
    histories are short."""

    patience: Count = 15
    """Epochs without a better val/ndcg@10 before training stops. The best epoch often comes late."""

    batch_size: Auto | Count = "auto"
    """Windows per step, counted at 50 positions each: a step has 50 x batch_size positions, in more windows if they are
    shorter. auto: 64; 16 if histories are short."""

    learning_rate: Positive = 0.002
    """Learning rate of the first epoch. It falls to 0 along a cosine."""

    temperature: Positive = 1.0
    """Divides the scores in the softmax."""

    logq: bool = True
    """Whether sampled logits are corrected by the log of the sampling probability."""

    in_batch_negatives: CountOr0 = 512
    """Negatives drawn from the targets of the batch, shared by all positions. 0: none."""

    uniform_negatives: Auto | CountOr0 = "auto"
    """Negatives drawn uniformly from the catalogue, shared by all positions. 0: none. A catalogue of no more items is
    taken whole. auto: 2,048; for autoencoder 16,384."""

    mask_user_positives: bool = True
    """Whether all items in a window are left out of its negatives. If false, only a position's own target is."""

    user_id: bool = False
    """Whether the query tower embeds the user id."""

    query_time: bool = False
    """Whether the query tower reads the hour and weekday of the request."""


@dataclass(frozen=True, config=STRICT)
class ResolvedRetrieval(Retrieval):
    """`Retrieval` without `auto`: what a model is built and trained with. `with_data_defaults` makes it."""

    arch: str = "sasrec"
    taste_dim: CountOr0 = 0
    dropout: Rate = 0.2
    window: Count = 50
    epochs: Count = 12
    batch_size: Count = 64
    uniform_negatives: CountOr0 = 2048


@dataclass(frozen=True, config=STRICT)
class Ranking:
    """The ranker and its training."""

    arch: str = "mlp"
    """mlp, dlrm or dcn (rec/ranking/archs.py). `rec.train --stage ranking --model-arch A` is short for
    `--set ranking.arch=A`."""

    objective: str = "implicit"
    """implicit: clicks on mined candidates, one by one. listwise: a softmax over each list. rating: squared error."""

    candidates: Count = 100
    """Length of a candidate list, in training and in service: the best of the index.k items that retrieval returns, so
    at most index.k."""

    holdout: Share = 0.15
    """Latest share of the training interactions, which labels the candidate lists."""

    hidden: Widths = (128, 64)
    """Widths of the hidden layers."""

    dropout: Rate = 0.2
    """Share of the hidden activations that a training step drops."""

    window: Auto | Count = "auto"
    """Longest history that objective rating reads. auto: 300, or retrieval.window if that is more. The other objectives
    read retrieval.window."""

    epochs: Count = 5
    """The most epochs."""

    patience: Count = 2
    """Epochs without a better validation metric before training stops."""

    batch_size: Auto | Count = "auto"
    """Candidate lists per step, or ratings with objective rating. auto: 64 lists, or 1,024 ratings."""

    l2: NotNegative = 0.03
    """Penalty of objective rating on the squared vectors of the users and items of a batch."""

    learning_rate: Auto | Positive = "auto"
    """Learning rate of the first epoch. It falls to 0 along a cosine. auto: 0.001; with objective rating 0.003."""


@dataclass(frozen=True, config=STRICT)
class ResolvedRanking(Ranking):
    """`Ranking` without `auto`: what a model is built and trained with. `with_ranking_defaults` makes it."""

    window: Count = 50
    batch_size: Count = 64
    learning_rate: Positive = 0.001


@dataclass(frozen=True, config=STRICT)
class Index:
    """The index over the items that a retrieval bundle holds."""

    kind: Literal["scann", "exact"] = "scann"
    """scann, or exact: brute force, which loads in a stock TF Serving."""

    recall_target: Target = 0.95
    """Recall@k, compared with the exact index, that ScaNN's settings are searched for."""

    k: Count = 100
    """Items that the retrieval bundle returns. Without a ranker they are the answer."""

    max_seen: CountOr0 = 1000
    """Items of a known user's history that the bundle stores, reads and excludes. 0: none."""

    exclude_seen: Auto | bool = "auto"
    """Whether what a user has met is not recommended again: in training, evaluation and service. A request may say
    otherwise. auto: true; false if the data set was prepared with --repeats keep."""

    max_per: dict[str, Count] = field(default_factory=dict)
    """Most items of an answer per value of an item column, such as {brand: 2}. A request may say otherwise."""

    diversity: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How much an answer prefers items unlike each other to good ones (rec/serving/selection.py). 0: not at all. A
    request may say otherwise."""


@dataclass(frozen=True, config=STRICT)
class Output:
    """Where results go."""

    checkpoints: str = "checkpoints"
    """Directory of the checkpoints."""

    savedmodels: str = "savedmodels"
    """Directory of the bundles."""


@dataclass(frozen=True, config=STRICT)
class Config:
    """A whole configuration."""

    dataset: str
    """A dataset directory, as written by rec.data_prep."""

    use_wandb: bool = False
    """Whether runs and bundles are logged to Weights & Biases."""

    seed: Seed = 42
    """Of all random numbers."""

    strategy: Literal["mirrored", "ps"] = "mirrored"
    """How several processes, named in TF_CONFIG, train together (rec/ops/distributed.py): mirrored, or ps, parameter
    servers. `rec.train --strategy S` is short for `--set strategy=S`."""

    features: Features = Features()
    retrieval: Retrieval = Retrieval()
    ranking: Ranking = Ranking()
    index: Index = Index()
    output: Output = Output()


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --config, --set and --keys: a command calls `load_config(args.config, args.overrides)`."""
    parser.add_argument(
        "--config",
        default="config/dummy/dummy_small.yaml",
        metavar="FILE",
        help="YAML file (default: %(default)s)",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="A.B=C",
        help="override a key, such as --set retrieval.epochs=3",
    )
    parser.add_argument(
        "--keys",
        action="version",
        version=describe_keys(),
        help="print every key of the configuration with its default and its values, and exit",
    )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, and over it `overrides`, each `a.b=c`. Raises UserError, see above, for whatever is wrong."""
    config = Config(dataset="")
    where = str(path)
    try:
        tree = yaml.load(_find(path).read_bytes(), _Loader)  # a SafeLoader: it builds plain values
        if tree is None:
            raise ValueError("the file is empty; it needs at least `dataset: data/NAME`")
        config = _update(config, tree, "")
        for override in overrides:
            where = f"--set {override}"
            config = _update(config, _parse_override(override), "")
        where = " --set ".join([str(path), *overrides])
        _check_together(config)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise UserError(f"{where}: {line}{error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # the latter also for a date such as 2024-13-45
        raise UserError(f"{where}: {error}") from None
    return config


def _find(path: str | Path) -> Path:
    """The file, or else the one of this name that comes with rec, such as config/dummy/dummy_small.yaml."""
    package = Path(__file__).parent  # where it is installed, or in a checkout
    places = (Path(path), package / "shipped" / path, package.parent / path)
    return next((place for place in places if place.exists()), places[0])


def _parse_override(text: str) -> object:
    """`a.b=c` as the tree that a file with this one key has."""
    key, equals, value = text.partition("=")
    if not key.strip() or not equals:
        raise ValueError("needs a key and a value, such as --set retrieval.epochs=3")
    tree = yaml.load(value, _Loader)
    for name in reversed(key.strip().split(".")):
        tree = {name: tree}
    return tree


def _check_together(config: Config) -> None:
    """Raises ValueError, without the file's name, for values that are each possible but not together."""
    if not config.dataset:
        raise ValueError(
            "dataset: missing key; add `dataset: data/NAME` or --set dataset=data/NAME"
        )
    candidates = config.ranking.candidates
    k = config.index.k
    if candidates > k:
        raise ValueError(
            f"ranking.candidates: must be at most index.k, which is {k}, not {candidates}"
        )
    retrieval = config.retrieval
    if retrieval.in_batch_negatives == 0 and retrieval.uniform_negatives == 0:
        raise ValueError(
            "retrieval.in_batch_negatives and retrieval.uniform_negatives: one of them must be "
            "above 0, since training needs negatives"
        )


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars, which JSON can hold."""
    return TypeAdapter(Config).dump_python(config, mode="json")


# ------------------------------------------------------------------------------------------------------------
# auto


@dataclass(frozen=True, config=STRICT)
class DataFacts:
    """What of a data set decides the keys that are `auto`, and whether a key has an effect."""

    ordered: bool  # interactions have timestamps
    interactions: int  # of training
    mean_history: float  # training interactions per user who has any
    trained_items: int  # that occur in training
    items: int  # of the whole catalogue
    has_user_features: bool


SHORT_HISTORY = 20  # training interactions per user, on average


def with_data_defaults(config: Retrieval, data: DataFacts) -> ResolvedRetrieval:
    """`auto` replaced by what suits the data."""
    settings = asdict(config)
    settings["query_time"] = config.query_time and data.ordered
    if config.arch == "auto":
        settings["arch"] = "sasrec" if data.ordered else "autoencoder"
    reads_sets = settings["arch"] == "autoencoder"
    is_short = data.mean_history < SHORT_HISTORY and not reads_sets
    positions = 6_000_000 if is_short else 5_000_000
    choices: dict[str, Any] = {
        "taste_dim": min(256, data.trained_items // 128 * 16),
        "dropout": 0.4 if is_short else 0.2,
        "window": 50 if data.ordered else 1000,
        "epochs": min(max(round(positions / data.interactions), 12), 100),
        "batch_size": 16 if is_short else 64,
        "uniform_negatives": 16384 if reads_sets else 2048,
    }
    settings |= {key: value for key, value in choices.items() if settings[key] == "auto"}
    return ResolvedRetrieval(**settings)


RATING_WINDOW = 300  # with 50, as retrieval reads, the RMSE on MovieLens 100K is .01 higher


def with_ranking_defaults(config: Ranking, retrieval_window: int) -> ResolvedRanking:
    """`auto` replaced by what suits the objective, for a retrieval model that reads histories of `retrieval_window`."""
    is_rating = config.objective == "rating"
    choices: dict[str, object] = {
        "window": max(retrieval_window, RATING_WINDOW),
        "batch_size": 1024 if is_rating else 64,
        "learning_rate": 0.003 if is_rating else 0.001,
    }
    settings = asdict(config)
    settings |= {key: value for key, value in choices.items() if settings[key] == "auto"}
    if not is_rating:
        settings["window"] = retrieval_window
    return ResolvedRanking(**settings)


# ------------------------------------------------------------------------------------------------------------
# Keys without effect

# A key -> the key that decides whether it is read, and the values of that one with which it is not. An architecture
# that is added to a registry counts as a reader of everything.
UNREAD: dict[str, tuple[str, tuple[str, ...]]] = {
    "retrieval.layers": ("retrieval.arch", ("two_tower", "autoencoder")),
    "retrieval.heads": ("retrieval.arch", ("two_tower", "gru4rec", "autoencoder")),
    "retrieval.temperature": ("retrieval.arch", ("autoencoder",)),
    "retrieval.logq": ("retrieval.arch", ("autoencoder",)),
    "retrieval.mask_user_positives": ("retrieval.arch", ("autoencoder",)),
    "ranking.holdout": ("ranking.objective", ("rating",)),
    "ranking.window": ("ranking.objective", ("implicit", "listwise")),
    "ranking.l2": ("ranking.objective", ("implicit", "listwise")),
    "index.recall_target": ("index.kind", ("exact",)),
}


def without_effect(config: Config, data: DataFacts, sections: Sequence[str]) -> list[str]:
    """A sentence for each key of these sections that was set, to other than its default, and has no effect."""
    retrieval = with_data_defaults(config.retrieval, data)
    chosen = replace(config, retrieval=retrieval)
    reasons = _unread(chosen) | _decided_by_data(chosen, retrieval, data)
    return [
        f"{key}: {_show(_get(config, key))} has no effect: {reason}"
        for key, reason in reasons.items()
        if key.partition(".")[0] in sections and _is_set(config, key)
    ]


def _unread(config: Config) -> dict[str, str]:
    """The keys of UNREAD that this config does not read, with the reason."""
    return {
        key: f"{decider} {_get(config, decider)} does not read it"
        for key, (decider, values) in UNREAD.items()
        if _get(config, decider) in values
    }


def _decided_by_data(
    config: Config, retrieval: ResolvedRetrieval, data: DataFacts
) -> dict[str, str]:
    """The keys that have no effect on these data, with the reason."""
    reasons = {}
    if not data.ordered:
        reasons["retrieval.query_time"] = "the interactions have no timestamps"
    if retrieval.in_batch_negatives == 0:
        reasons["retrieval.logq"] = "every negative is drawn with the same probability"
    if retrieval.uniform_negatives >= data.trained_items:
        whole = f"the softmax is over all {data.trained_items:,} items, which are no more than "
        whole += f"retrieval.uniform_negatives {retrieval.uniform_negatives:,}"
        reasons["retrieval.in_batch_negatives"] = whole
        reasons["retrieval.logq"] = whole
    if retrieval.uniform_negatives > data.trained_items:
        limit = f"training has only {data.trained_items:,} items, so it takes all of them"
        reasons["retrieval.uniform_negatives"] = limit
    reads_context = data.has_user_features or retrieval.user_id or retrieval.query_time
    if retrieval.arch == "autoencoder" and not reads_context:
        reasons["retrieval.dropout"] = (
            "retrieval.arch autoencoder has it only on user features, user_id and query_time"
        )
    for key in ("index.k", "ranking.candidates"):
        if _get(config, key) > data.items:
            reasons[key] = f"the catalogue has only {data.items:,} items"
    return reasons


def overruled(config: Config, trained: Config, sections: Sequence[str]) -> list[str]:
    """A sentence for each key of these sections that was set to another value than the model was trained with."""
    names = [
        f"{section}.{own.name}" for section in sections for own in fields(_get(config, section))
    ]
    return [
        f"{key}: {_show(_get(config, key))} has no effect: "
        f"the checkpoint was trained with {_show(_get(trained, key))}"
        for key in names
        if _is_set(config, key) and _get(config, key) != _get(trained, key)
    ]


def first_problem(error: ValidationError) -> str:
    """The first problem of stored settings that another version of rec has written, with its key."""
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"


def _get(config: Config, key: str) -> Any:
    """The value of a key such as `retrieval.epochs`."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _is_set(config: Config, key: str) -> bool:
    return _get(config, key) != _get(Config(dataset=""), key)


# ------------------------------------------------------------------------------------------------------------
# Errors and documentation, from the JSON schema of the fields


def describe_keys() -> str:
    """A paragraph for each key: its default, what it means, which values it takes."""
    paragraphs = []
    for key, schema in _key_schemas().items():
        empty = {} if schema.get("type") == "object" else "no default"
        default = schema.get("default", empty)
        shown = default if isinstance(default, str) else _show(default)
        text = " ".join(schema["description"].split())
        paragraphs.append(f"{key}: {shown}\n    {text}\n    Takes {_words(schema)}.")
    return "\n".join(paragraphs)


def _key_schemas() -> dict[str, dict[str, Any]]:
    """Key -> JSON schema, for all keys."""
    whole = TypeAdapter(Config).json_schema()
    keys = {}
    for name, schema in whole["properties"].items():
        if "$ref" not in schema:
            keys[name] = schema
            continue
        section = whole["$defs"][schema["$ref"].rpartition("/")[2]]
        keys |= {f"{name}.{own}": of_own for own, of_own in section["properties"].items()}
    return keys


def _words(schema: dict[str, Any]) -> str:
    """The values that a JSON schema allows, such as `a number of 0 or more and below 1`."""
    if "anyOf" in schema:
        return " or ".join(_words(choice) for choice in schema["anyOf"])
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return " or ".join(schema["enum"])
    kind = schema["type"]
    if kind == "array":
        return f"a list of {schema['minItems']} or more entries, each {_words(schema['items'])}"
    if kind == "object":
        return f"{{key: {_words(schema['additionalProperties'])}}}"
    names = {"boolean": "true or false", "integer": "a whole number", "number": "a number"}
    limits = {
        "minimum": "of {} or more",
        "exclusiveMinimum": "above {}",
        "maximum": "at most {}",
        "exclusiveMaximum": "below {}",
    }
    bounds = [text.format(schema[name]) for name, text in limits.items() if name in schema]
    return " ".join([names.get(kind, "text"), " and ".join(bounds)]).strip()


def _problem(error: ValidationError, prefix: str) -> str:
    """The first problem of a section as a sentence that names the key, or the entry of its list or dict."""
    problems = error.errors()
    name = problems[0]["loc"][0]
    of_key = [problem for problem in problems if problem["loc"][0] == name]
    deepest = max(of_key, key=lambda problem: len(problem["loc"]))
    key = f"{prefix}{name}"
    schema = _key_schemas()[key]
    place = deepest["loc"][1:]
    if "anyOf" in schema:
        place = place[1:]  # the first part says which of the choices did not fit
    if place:
        schema = _entry_schema(schema)
        if place[-1] != "[key]":
            key += f"[{place[0]}]" if isinstance(place[0], int) else f".{place[0]}"
    value = deepest["input"]
    words = _words(schema)
    if deepest["type"] == "finite_number":
        words = words.replace("number", "finite number")
    needs_quotes = words == "text" and not isinstance(value, list | dict | None)
    hint = "; put it in quotes" if needs_quotes else ""
    return f"{key}: expected {words}, got {_show(value)}{hint}"


def _entry_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of what a list or dict holds."""
    for choice in schema.get("anyOf", [schema]):
        entry = choice.get("items") or choice.get("additionalProperties")
        if entry:
            return entry
    raise KeyError("no list, no dict")


# ------------------------------------------------------------------------------------------------------------
# YAML -> dataclasses


def _update(section: Any, tree: object, prefix: str) -> Any:
    """`section`, a dataclass, with what `tree` sets. Raises ValueError, without the file's name."""
    names = [field.name for field in fields(section)]
    if not isinstance(tree, dict):
        name = prefix[:-1] or "the file"
        raise ValueError(f"{name}: expected keys, such as {prefix}{names[0]}, got {_show(tree)}")
    changes = {}
    for name, value in tree.items():
        if name not in names:
            raise ValueError(f"{prefix}{name}: unknown key; {_hint(str(name), names, prefix)}")
        now = getattr(section, name)
        changes[name] = _update(now, value, f"{name}.") if is_dataclass(now) else value
    try:
        return replace(section, **changes)
    except ValidationError as error:
        raise ValueError(_problem(error, prefix)) from None


def _hint(name: str, names: list[str], prefix: str) -> str:
    """The nearest key, of this section rather than of another one; or the keys of this section."""
    keys = {key.rpartition(".")[2]: key for key in _key_schemas()}
    keys |= {own: prefix + own for own in names}
    close = difflib.get_close_matches(name, keys, n=1)
    return f"did you mean {keys[close[0]]}?" if close else f"the keys here are {', '.join(names)}"


def _show(value: object) -> str:
    """A value as it is written in YAML, nearly."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)


class _Loader(yaml.SafeLoader):
    """YAML where 1e-3 is a number (PyYAML wants 1.0e-3) and a repeated key an error (it takes the last)."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} occurs twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return node


_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
