"""The configuration: strict YAML into frozen dataclasses. Every key is a field below, with default and rule.

- `load_config(path, ["retrieval.epochs=3"])` reads a file, then the `--set` overrides (values are YAML too).
- An unknown, missing or repeated key, a wrong type, an impossible value: one sentence naming file and key.
- The loader knows no single key: a new field is a new key.

Not covered: the names of architectures. Their registries check them; they need TensorFlow, this does not.
"""

import argparse
import difflib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import partial
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
KINDS = ("categorical", "multi", "numeric", "text", "time")
FeatureKind = Annotated[str, "one of " + ", ".join(KINDS), KINDS.__contains__]
Columns = Annotated[str | dict[str, FeatureKind], "auto, or {column: kind}", lambda x: x == "auto" or type(x) is dict]


@dataclass(frozen=True)
class Features:
    """Which columns of users.parquet and items.parquet the models read: `auto`, or {column: kind}.

    Kinds: categorical, multi (a list, such as genres), numeric, text (title tokens), time (seconds since
    1970). `auto` takes every column and its kind from its type; `{}` takes none.
    """

    users: Columns = "auto"
    items: Columns = "auto"


@dataclass(frozen=True)
class Retrieval:
    arch: str = "two_tower"  # query tower; see rec/retrieval/towers.py
    embedding_dim: Count = 64
    layers: Count = 2  # transformer blocks or recurrent layers; two_tower ignores it
    heads: Count = 2  # attention heads of sasrec
    dropout: Rate = 0.2
    window: Count = 50  # positions a training example; also the longest history that a tower reads
    epochs: Count = 20  # at most: early stopping on val/ndcg@10
    patience: Count = 8  # epochs without a better val/ndcg@10 before training stops
    batch_size: Count = 64  # windows a step
    learning_rate: Positive = 0.005  # sasrec wants 0.002
    temperature: Positive = 1.0
    logq: bool = True  # correct sampled logits by log of the sampling probability
    in_batch_negatives: CountOr0 = 256  # targets of other examples in the batch, shared by all; 0 = none
    uniform_negatives: CountOr0 = 256  # items drawn uniformly from the catalogue, shared by all; 0 = none
    hard_negatives: CountOr0 = 0  # keep only the n highest-scored negatives of each position; 0 = all
    mask_accidental_hits: bool = True  # a negative that is the position's own target does not count
    mask_user_positives: bool = True  # nor does one that the user has interacted with elsewhere in the window
    user_id: bool = True  # the query tower embeds the user id
    query_time: bool = False  # the query tower reads the hour and weekday of the request


@dataclass(frozen=True)
class Ranking:
    arch: str = "mlp"  # mlp, dlrm or dcn
    # implicit: clicks on mined candidates; rating: squared error on ratings
    objective: Annotated[str, "one of implicit, rating", ("implicit", "rating").__contains__] = "implicit"
    candidates: Count = 100  # length of a candidate list
    holdout: Share = 0.15  # latest share of the training interactions that labels the candidate lists
    hidden: tuple[Count, ...] = (128, 64)
    dropout: Rate = 0.2
    epochs: Count = 10
    patience: Count = 3
    batch_size: Count = 64  # candidate lists a step; with `rating`, 16 ratings count as one
    learning_rate: Positive = 0.001


@dataclass(frozen=True)
class Index:
    # scann, or exact (brute force; loads in a stock TF Serving)
    kind: Annotated[str, "one of scann, exact", ("scann", "exact").__contains__] = "scann"
    recall_target: Target = 0.95  # recall@k against the exact index that ScaNN's settings are searched for
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
    features: Features = field(default_factory=Features)
    retrieval: Retrieval = field(default_factory=Retrieval)
    ranking: Ranking = field(default_factory=Ranking)
    index: Index = field(default_factory=Index)
    output: Output = field(default_factory=Output)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --config and --set: a command calls `load_config(args.config, args.overrides)`."""
    default, text = "config/dummy/dummy_small.yaml", "override a key, such as --set retrieval.epochs=3"
    parser.add_argument("--config", default=default, metavar="FILE", help="YAML file (default: %(default)s)")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C", help=text)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, and over it `overrides`, each `a.b=c`. Raises UserError, see above, for whatever is wrong."""
    tree = _parse(Path(path), str(path))
    if tree is None:
        raise UserError(f"{path}: the file is empty; it needs at least `dataset: data/NAME`")
    config: Config = _apply(Config(dataset=""), tree, "", str(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not key.strip() or not equals:
            raise UserError(f"--set {override}: needs a key and a value, such as --set retrieval.epochs=3")
        tree = _parse(text, f"--set {override}")
        for name in reversed(key.strip().split(".")):
            tree = {name: tree}
        config = _apply(config, tree, "", f"--set {override}")
    where, retrieval = " --set ".join([str(path), *overrides]), config.retrieval
    if not config.dataset:
        raise UserError(f"{where}: dataset: missing key; add `dataset: data/NAME` or --set dataset=data/NAME")
    if (candidates := config.ranking.candidates) > (k := config.index.k):
        raise UserError(f"{where}: ranking.candidates: must be at most index.k, which is {k}, not {candidates}")
    if retrieval.in_batch_negatives + retrieval.uniform_negatives == 0:
        keys = "retrieval.in_batch_negatives, retrieval.uniform_negatives"
        raise UserError(f"{where}: {keys}: must not both be 0: training needs negatives")
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars, which JSON can hold."""
    return asdict(config, dict_factory=lambda pairs: {k: list(v) if type(v) is tuple else v for k, v in pairs})


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a list"}
_fields = partial(get_type_hints, include_extras=True)  # {key: type}, with the rules


def _apply(section: Any, tree: object, prefix: str, where: str) -> Any:
    """`section`, a dataclass, with what `tree` sets."""
    types, changes = _fields(type(section)), {}
    if not isinstance(tree, dict):
        name, example = prefix[:-1] or "the file", prefix + next(iter(types))
        raise UserError(f"{where}: {name}: expected keys, such as {example}, got {_show(tree)}")
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in types:  # the nearest key is one of this section rather than of another one
            sections = {other: kind for other, kind in _fields(Config).items() if is_dataclass(kind)}
            keys = {own: f"{other}.{own}" for other, kind in sections.items() for own in _fields(kind)}
            keys |= {own: prefix + own for own in types}
            close = difflib.get_close_matches(str(name), keys, n=1)
            hint = f"did you mean {keys[close[0]]}?" if close else f"the keys here are {', '.join(types)}"
            raise UserError(f"{where}: {key}: unknown key; {hint}")
        if is_dataclass(types[name]):
            changes[name] = _apply(getattr(section, name), value, f"{key}.", where)
        else:
            changes[name] = _convert(types[name], value, f"{where}: {key}")
    return replace(section, **changes)


def _convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as the field's type. Whole numbers pass for numbers, lists become tuples; nothing else does."""
    if get_origin(kind) is Annotated:
        kind, rule, holds = get_args(kind)
        value = _convert(kind, value, where)
        if not holds(value):
            raise UserError(f"{where}: must be {rule}, not {_show(value)}")
        return value
    choices = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    for choice in choices:
        outer, inner = get_origin(choice) or choice, get_args(choice)
        if outer is tuple and type(value) is list:
            return tuple(_convert(inner[0], entry, f"{where}[{i}]") for i, entry in enumerate(value))
        if outer is dict and type(value) is dict:
            return {_convert(inner[0], k, where): _convert(inner[1], v, f"{where}.{k}") for k, v in value.items()}
        if type(value) is outer or (outer is float and type(value) is int):  # no isinstance: True is an int
            return outer(value)
    hint = "; put it in quotes" if kind is str and not isinstance(value, list | dict | None) else ""
    expected = " or ".join(_NAMES.get(get_origin(choice) or choice, "{key: value}") for choice in choices)
    raise UserError(f"{where}: expected {expected}, got {_show(value)}{hint}")


def _show(value: object) -> str:
    return "nothing" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


class _Loader(yaml.SafeLoader):
    """YAML where 1e-3 is a number (PyYAML wants 1.0e-3) and a repeated key an error (it takes the last)."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} occurs twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return node


_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _parse(source: Path | str, where: str) -> Any:
    try:
        text = source.read_bytes() if isinstance(source, Path) else source
        return yaml.load(text, _Loader)  # a SafeLoader: it builds plain values only
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-45
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        raise UserError(f"{where}: {f'line {mark.line + 1}: ' if mark else ''}{problem}") from None
