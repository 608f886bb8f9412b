"""The configuration: strict YAML into frozen dataclasses. Every key is a field below, with default and rule.

- `load_config(path, ["retrieval.epochs=3"])` reads a file, then the `--set` overrides (values are YAML too).
- An unknown, missing or repeated key, a wrong type, an impossible value: one sentence naming file and key.
- The loader knows no single key: a new field is a new key.

Not covered: the names of architectures. Their registries check them; they need TensorFlow, this does not.
"""

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import yaml

from rec.errors import UserError


@dataclass(frozen=True)
class Rule:
    """What a value must satisfy beyond its type: `retrieval.epochs: must be 1 or more, not 0`."""

    text: str
    holds: Callable[[Any], bool]


def one_of(*choices: str) -> Rule:
    return Rule("one of " + ", ".join(choices), lambda value: value in choices)


Count = Annotated[int, Rule("1 or more", lambda n: n >= 1)]
CountOr0 = Annotated[int, Rule("0 or more", lambda n: n >= 0)]
Seed = Annotated[int, Rule("from 0 to 4294967295, as NumPy wants it", lambda n: 0 <= n < 2**32)]
Positive = Annotated[float, Rule("above 0 and finite", lambda x: 0 < x < float("inf"))]
Rate = Annotated[float, Rule("0 or more and below 1", lambda x: 0 <= x < 1)]
Share = Annotated[float, Rule("above 0 and below 1", lambda x: 0 < x < 1)]
Target = Annotated[float, Rule("above 0 and at most 1", lambda x: 0 < x <= 1)]
FeatureKind = Annotated[str, one_of("categorical", "multi", "numeric", "text", "time")]
Columns = Annotated[
    str | dict[str, FeatureKind], Rule("auto, or {column: kind}", lambda x: x == "auto" or type(x) is dict)
]


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
    objective: Annotated[str, one_of("implicit", "rating")] = "implicit"
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
    kind: Annotated[str, one_of("scann", "exact")] = "scann"
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


# ------------------------------------------------------------------------------------------------------------
# From a command line and a file


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --config and --set: a command calls `load_config(args.config, args.overrides)`."""
    default, text = "config/dummy/dummy_small.yaml", "override a key, such as --set retrieval.epochs=3"
    parser.add_argument("--config", default=default, metavar="FILE", help="YAML file (default: %(default)s)")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C", help=text)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, and over it `overrides`, each `a.b=c`.

    Raises:
        UserError: the file cannot be read or is not YAML; a key is unknown, missing or repeated; a value has
            the wrong type or breaks its rule; keys contradict each other.
    """
    tree = _parse(_read(Path(path)), str(path))
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
    _check_together(config, " --set ".join([str(path), *overrides]))
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars, which JSON can hold."""

    def plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in pairs}

    return asdict(config, dict_factory=plain)


def _check_together(config: Config, where: str) -> None:
    if not config.dataset:
        raise UserError(f"{where}: dataset: missing key; add `dataset: data/NAME` or --set dataset=data/NAME")
    retrieval, candidates, k = config.retrieval, config.ranking.candidates, config.index.k
    if candidates > k:
        raise UserError(f"{where}: ranking.candidates: must be at most index.k, which is {k}, not {candidates}")
    if retrieval.in_batch_negatives + retrieval.uniform_negatives == 0:
        keys = "retrieval.in_batch_negatives, retrieval.uniform_negatives"
        raise UserError(f"{where}: {keys}: must not both be 0: training needs negatives")


# ------------------------------------------------------------------------------------------------------------
# Keys and values

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a list"}
_kinds = partial(get_type_hints, include_extras=True)  # {field: type}, with the rules


def _apply(section: Any, tree: object, prefix: str, where: str) -> Any:
    """`section`, a dataclass, with what `tree` sets."""
    kinds, changes = _kinds(type(section)), {}
    if not isinstance(tree, dict):
        name, example = prefix[:-1] or "the file", prefix + next(iter(kinds))
        raise UserError(f"{where}: {name}: expected keys, such as {example}, got {_show(tree)}")
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in kinds:
            raise UserError(f"{where}: {key}: unknown key; {_nearest(str(name), prefix, kinds)}")
        if is_dataclass(kinds[name]):
            changes[name] = _apply(getattr(section, name), value, f"{key}.", where)
        else:
            changes[name] = _convert(kinds[name], value, f"{where}: {key}")
    return replace(section, **changes)


def _nearest(name: str, prefix: str, kinds: dict[str, Any]) -> str:
    """The most similar key, of this section rather than of another one; or else what this section has."""
    sections = {section: kind for section, kind in _kinds(Config).items() if is_dataclass(kind)}
    keys = {own: f"{section}.{own}" for section, kind in sections.items() for own in _kinds(kind)}
    keys |= {own: prefix + own for own in kinds}
    close = difflib.get_close_matches(name, keys, n=1)
    return f"did you mean {keys[close[0]]}?" if close else f"the keys here are {', '.join(kinds)}"


def _convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as the field's type. Whole numbers pass for numbers, lists become tuples; nothing else does."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        value, rule = _convert(args[0], value, where), args[1]
        if not rule.holds(value):
            raise UserError(f"{where}: must be {rule.text}, not {_show(value)}")
        return value
    choices = args if origin in (Union, UnionType) else (kind,)
    if kind not in choices:
        for choice in choices:
            if (get_origin(choice) or choice) is type(value):
                return _convert(choice, value, where)
    elif origin is tuple and isinstance(value, list):
        return tuple(_convert(args[0], entry, f"{where}[{i}]") for i, entry in enumerate(value))
    elif origin is dict and isinstance(value, dict):
        return {_convert(args[0], k, where): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    elif kind is float and type(value) is int:
        return float(value)
    elif type(value) is kind:  # not isinstance: True is an int, and `epochs: true` a mistake
        return value
    hint = "; put it in quotes" if kind is str and not isinstance(value, list | dict | None) else ""
    expected = " or ".join(_NAMES.get(get_origin(choice) or choice, "{key: value}") for choice in choices)
    raise UserError(f"{where}: expected {expected}, got {_show(value)}{hint}")


def _show(value: object) -> str:
    return "nothing" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


class _Loader(yaml.SafeLoader):
    """YAML where 1e-3 is a number (PyYAML wants 1.0e-3) and a repeated key an error (it takes the last)."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [str(key.value) for key, _ in node.value]
        for position, (key, _) in enumerate(node.value):
            if keys.index(keys[position]) < position:
                raise yaml.MarkedYAMLError(problem=f"{key.value} occurs twice", problem_mark=key.start_mark)
        return node


_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        there = [str(file) for file in sorted([*path.parent.glob("*.yaml"), *Path("config").rglob("*.yaml")])]
        close = difflib.get_close_matches(str(path), there, n=1, cutoff=0.0)
        raise UserError(f"{path}: no such file" + (f"; did you mean {close[0]}?" if close else "")) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _parse(text: bytes | str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: it builds plain values only
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-45
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        raise UserError(f"{where}: {f'line {mark.line + 1}: ' if mark else ''}{problem}") from None
