"""The configuration: strict YAML into frozen dataclasses. Every key is a field below, with default and rule.

- `load_config(path, ["retrieval.epochs=3"])` reads a file, then the `--set` overrides (values are YAML too).
- An unknown, missing or repeated key, a wrong type, an impossible value: one sentence naming file and key.
- A key that has no effect, since another key or the data decide so: one sentence too (`without_effect`, `overruled`).
- The loader knows no single key: a new field is a new key.

Not covered: the names of architectures, objectives and kinds of features. Their registries check them; they need
TensorFlow, this does not.
"""

import argparse
import difflib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import yaml

from rec.errors import UserError

# Beyond its type, a value has a rule: the text (`retrieval.epochs: must be 1 or more, not 0`) and its test.
Count = Annotated[int, "1 or more", lambda n: n >= 1]
CountOr0 = Annotated[int, "0 or more", lambda n: n >= 0]
Seed = Annotated[int, "from 0 to 4294967295, as NumPy wants it", lambda n: 0 <= n < 2**32]
Positive = Annotated[float, "above 0 and finite", lambda x: 0 < x < float("inf")]
Rate = Annotated[float, "0 or more and below 1", lambda x: 0 <= x < 1]
Share = Annotated[float, "above 0 and below 1", lambda x: 0 < x < 1]
Target = Annotated[float, "above 0 and at most 1", lambda x: 0 < x <= 1]
NotNegative = Annotated[float, "0 or more and finite", lambda x: 0 <= x < float("inf")]
Strategy = Annotated[str, "mirrored or ps", lambda name: name in ("mirrored", "ps")]
Columns = Annotated[
    str | dict[str, str], "auto, or {column: kind}", lambda x: x == "auto" or type(x) is dict
]


@dataclass(frozen=True)
class Features:
    # kinds: categorical, multi (a list, such as genres), numeric, text (title tokens), time (seconds since 1970)
    users: Columns = "auto"  # of users.parquet, {column: kind}; auto = all, each its kind from its type; {} = none
    items: Columns = "auto"  # of items.parquet


@dataclass(frozen=True)
class Retrieval:
    # query tower (rec/retrieval/towers.py); auto = sasrec, or autoencoder where interactions have no timestamps
    arch: str = "auto"
    embedding_dim: Count = 64
    layers: Count = 2  # transformer blocks or recurrent layers
    heads: Count = 2  # attention heads of sasrec
    dropout: Rate = 0.2
    window: CountOr0 = 0  # positions a training example, and the longest history that is read; 0 = 50, unordered 1000
    epochs: CountOr0 = (
        0  # at most: early stopping on val/ndcg@10; 0 = 12 to 100, for about 1,500 steps
    )
    patience: Count = (
        15  # epochs without a better val/ndcg@10 before training stops; the best often come late
    )
    batch_size: Count = (
        64  # windows a step, at 50 positions each: more of them where they are shorter
    )
    learning_rate: Positive = 0.002  # falls to 0 along a cosine
    temperature: Positive = 1.0
    logq: bool = True  # correct sampled logits by log of the sampling probability
    in_batch_negatives: CountOr0 = (
        512  # targets of other examples in the batch, shared by all; 0 = none
    )
    # items drawn uniformly, shared by all; a catalogue no larger is taken whole; 0 = 2048, autoencoder 16384
    uniform_negatives: CountOr0 = 0
    # What the user has interacted with in the window is no negative; if false, just the position's own target is none.
    mask_user_positives: bool = True
    user_id: bool = False  # the query tower embeds the user id
    query_time: bool = False  # the query tower reads the hour and weekday of the request


@dataclass(frozen=True)
class Ranking:
    arch: str = "mlp"  # mlp, dlrm or dcn
    # implicit: clicks on mined candidates, one by one; listwise: a softmax over each list; rating: squared error
    objective: str = "implicit"
    candidates: Count = 100  # length of a candidate list
    holdout: Share = (
        0.15  # latest share of the training interactions that labels the candidate lists
    )
    hidden: Annotated[tuple[Count, ...], "at least one width", bool] = (128, 64)
    dropout: Rate = 0.2
    epochs: Count = 5
    patience: Count = 2
    batch_size: Count = 64  # candidate lists a step; with `rating`, 16 ratings for each
    l2: NotNegative = (
        0.03  # with `rating`: penalty on the squared vectors of the users and items of a batch
    )
    learning_rate: Positive = 0.001  # falls to 0 along a cosine; with `rating`, 3 times as much


@dataclass(frozen=True)
class Index:
    # scann, or exact (brute force; loads in a stock TF Serving)
    kind: Annotated[str, "one of scann, exact", ("scann", "exact").__contains__] = "scann"
    recall_target: Target = (
        0.95  # recall@k against the exact index that ScaNN's settings are searched for
    )
    k: Count = 100  # candidates that the retrieval bundle returns
    max_seen: CountOr0 = 1000  # items of a known user's history that the bundle stores and excludes


@dataclass(frozen=True)
class Output:
    checkpoints: str = "checkpoints"
    savedmodels: str = "savedmodels"


@dataclass(frozen=True)
class Config:
    dataset: str  # a dataset directory, as written by rec.data_prep
    use_wandb: bool = False
    seed: Seed = 42
    strategy: Strategy = (
        "mirrored"  # of several processes, named in TF_CONFIG (rec/ops/distributed.py)
    )
    features: Features = Features()
    retrieval: Retrieval = Retrieval()
    ranking: Ranking = Ranking()
    index: Index = Index()
    output: Output = Output()


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --config and --set: a command calls `load_config(args.config, args.overrides)`."""
    default, text = (
        "config/dummy/dummy_small.yaml",
        "override a key, such as --set retrieval.epochs=3",
    )
    parser.add_argument(
        "--config", default=default, metavar="FILE", help="YAML file (default: %(default)s)"
    )
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="A.B=C", help=text
    )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, and over it `overrides`, each `a.b=c`. Raises UserError, see above, for whatever is wrong."""
    config, where = Config(dataset=""), str(path)
    try:
        if (
            tree := yaml.load(Path(path).read_bytes(), _Loader)
        ) is None:  # a SafeLoader: it builds plain values only
            raise ValueError("the file is empty; it needs at least `dataset: data/NAME`")
        config = _update(config, tree, "")
        for override in overrides:
            where = f"--set {override}"
            key, equals, text = override.partition("=")
            if not key.strip() or not equals:
                raise ValueError("needs a key and a value, such as --set retrieval.epochs=3")
            tree = yaml.load(text, _Loader)
            for name in reversed(key.strip().split(".")):
                tree = {name: tree}
            config = _update(config, tree, "")
        where = " --set ".join([str(path), *overrides])
        if not config.dataset:
            raise ValueError(
                "dataset: missing key; add `dataset: data/NAME` or --set dataset=data/NAME"
            )
        if (candidates := config.ranking.candidates) > (k := config.index.k):
            raise ValueError(
                f"ranking.candidates: must be at most index.k, which is {k}, not {candidates}"
            )
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from None
    except (
        yaml.YAMLError,
        ValueError,
    ) as error:  # YAML raises the latter for a date such as 2024-13-45
        mark, problem = (
            getattr(error, "problem_mark", None),
            getattr(error, "problem", None) or error,
        )
        raise UserError(f"{where}: {f'line {mark.line + 1}: ' if mark else ''}{problem}") from None
    return config


def with_data_defaults(config: Retrieval, ordered: bool, interactions: int) -> Retrieval:
    """`auto` and 0 replaced by what suits a data set, with or without timestamps, of so many training interactions."""
    arch = ("sasrec" if ordered else "autoencoder") if config.arch == "auto" else config.arch
    epochs = config.epochs or min(max(round(5_000_000 / interactions), 12), 100)
    uniform = config.uniform_negatives or (16384 if arch == "autoencoder" else 2048)
    return replace(
        config,
        arch=arch,
        window=config.window or (50 if ordered else 1000),
        epochs=epochs,
        uniform_negatives=uniform,
        query_time=config.query_time and ordered,
    )


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars, which JSON can hold."""
    return asdict(
        config, dict_factory=lambda pairs: {k: list(v) if type(v) is tuple else v for k, v in pairs}
    )


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
    "ranking.l2": ("ranking.objective", ("implicit", "listwise")),
    "index.recall_target": ("index.kind", ("exact",)),
}


@dataclass(frozen=True)
class DataFacts:
    """What of a data set decides whether a key has an effect."""

    ordered: bool  # interactions have timestamps
    interactions: int  # of training
    trained_items: int  # that occur in training
    items: int  # of the whole catalogue
    has_user_features: bool


def without_effect(config: Config, data: DataFacts, sections: Sequence[str]) -> list[str]:
    """A sentence for each key of these sections that was set, to other than its default, and has no effect."""
    retrieval = with_data_defaults(config.retrieval, data.ordered, data.interactions)
    chosen = replace(config, retrieval=retrieval)
    reasons = _unread(chosen) | _decided_by_data(chosen, data)
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


def _decided_by_data(config: Config, data: DataFacts) -> dict[str, str]:
    """The keys that have no effect on these data, with the reason."""
    retrieval = config.retrieval
    reasons = {}
    if not data.ordered:
        reasons["retrieval.query_time"] = "the interactions have no timestamps"
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


def overruled(config: Config, run: dict[str, Any], sections: Sequence[str]) -> list[str]:
    """A sentence for each key of these sections that was set to another value than the checkpoint was trained with.

    `run` is the checkpoint's run.json.
    """
    trained = with_run(config, run)
    names = [
        f"{section}.{own.name}" for section in sections for own in fields(_get(config, section))
    ]
    return [
        f"{key}: {_show(_get(config, key))} has no effect: "
        f"the checkpoint was trained with {_show(_get(trained, key))}"
        for key in names
        if _is_set(config, key) and _get(config, key) != _get(trained, key)
    ]


def with_run(config: Config, run: dict[str, Any]) -> Config:
    """`config` with what a checkpoint's run.json says that its model was trained with.

    The length of the candidate lists stays: a bundle may re-rank more or fewer than the ranker was trained on.
    """
    changes: dict[str, Any] = {"features": Features(**run["features"]), "seed": run["seed"]}
    if "retrieval" in run:
        changes["retrieval"] = Retrieval(**run["retrieval"])
    if "ranking" in run:
        ranking = Ranking(**{**run["ranking"], "hidden": tuple(run["ranking"]["hidden"])})
        changes["ranking"] = replace(ranking, candidates=config.ranking.candidates)
    return replace(config, **changes)


def _get(config: Config, key: str) -> Any:
    """The value of a key such as `retrieval.epochs`."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _is_set(config: Config, key: str) -> bool:
    return _get(config, key) != _get(Config(dataset=""), key)


# ------------------------------------------------------------------------------------------------------------
# YAML -> dataclasses


def _update(section: Any, tree: object, prefix: str) -> Any:
    """`section`, a dataclass, with what `tree` sets. Raises ValueError, without the file's name."""
    types, changes = get_type_hints(type(section), include_extras=True), {}
    if not isinstance(tree, dict):
        name, example = prefix[:-1] or "the file", prefix + next(iter(types))
        raise ValueError(f"{name}: expected keys, such as {example}, got {_show(tree)}")
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in types:  # the nearest key is one of this section rather than of another one
            sections = {
                field.name: field.default for field in fields(Config) if is_dataclass(field.default)
            }
            keys = {
                own.name: f"{other}.{own.name}"
                for other, kind in sections.items()
                for own in fields(kind)
            }
            keys |= {own: prefix + own for own in types}
            close = difflib.get_close_matches(str(name), keys, n=1)
            hint = (
                f"did you mean {keys[close[0]]}?"
                if close
                else f"the keys here are {', '.join(types)}"
            )
            raise ValueError(f"{key}: unknown key; {hint}")
        now = getattr(section, name)
        changes[name] = (
            _update(now, value, f"{key}.")
            if is_dataclass(now)
            else _convert(types[name], value, key)
        )
    return replace(section, **changes)


def _convert(kind: Any, value: Any, key: str) -> Any:
    """`value` as `kind`, or ValueError. Whole numbers pass for numbers, lists become tuples; nothing else does."""
    if get_origin(kind) is Annotated:
        kind, rule, holds = get_args(kind)
        value = _convert(kind, value, key)
        if not holds(value):
            raise ValueError(f"{key}: must be {rule}, not {_show(value)}")
        return value
    choices = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    for choice in choices:
        outer, inner = get_origin(choice) or choice, get_args(choice)
        if outer is tuple and type(value) is list:
            return tuple(_convert(inner[0], entry, f"{key}[{i}]") for i, entry in enumerate(value))
        if outer is dict and type(value) is dict:
            return {
                _convert(inner[0], k, key): _convert(inner[1], v, f"{key}.{k}")
                for k, v in value.items()
            }
        if type(value) is outer or (
            outer is float and type(value) is int
        ):  # no isinstance: True is an int
            return outer(value)
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        tuple: "a list",
    }
    expected = " or ".join(
        names.get(get_origin(choice) or choice, "{key: value}") for choice in choices
    )
    hint = "; put it in quotes" if kind is str and not isinstance(value, list | dict | None) else ""
    raise ValueError(f"{key}: expected {expected}, got {_show(value)}{hint}")


def _show(value: object) -> str:
    return (
        "nothing"
        if value is None
        else str(value).lower()
        if isinstance(value, bool)
        else repr(value)
    )


class _Loader(yaml.SafeLoader):
    """YAML where 1e-3 is a number (PyYAML wants 1.0e-3) and a repeated key an error (it takes the last)."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} occurs twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return node


_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
