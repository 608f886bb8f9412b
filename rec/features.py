"""Vocabularies and features: strings become integers once, here, and the towers look everything up by row.

- A `Vocabulary` numbers ids. Row 0 of users is the unknown user; rows 0, 1, 2 of items are PAD, START, UNKNOWN.
- `fit_columns` learns each feature column's encoding from the rows that training has seen; `Column.encode` applies it.
  A column is of a kind of `TOKENIZERS` or of `NUMBERS`: add a kind by adding a function to one of them.
  `fit_columns` prints a line per column, and leaves out those that cannot tell one such row from another.
- `Encoder` (a Keras layer) turns rows into vectors: the id's embedding plus what the feature columns say of the row.
  The encoded columns are part of the layer, so the exported graph computes exactly what training computed.

Vectors of images and texts are computed before, such as by rec.data_prep.embed, and are columns of kind `vector`.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
import tensorflow as tf

from rec.errors import UserError, note
from rec.tables import ColumnLine, describe_columns, shorten

PAD, START, UNKNOWN, FIRST_ITEM = (
    0,
    1,
    2,
    3,
)  # item rows: padding, start of a sequence, an id not in training
UNKNOWN_USER, FIRST_USER = 0, 1
MAX_TOKENS = 8  # of a multi-valued or text column; the rest is cut off
MIN_COUNT = 2  # a token that occurs in one row only says nothing that the id does not
MAX_VOCABULARY = 50_000  # tokens of one column, the most frequent first
FROZEN_AT_ONCE = (
    100_000  # rows, so that millions of them do not need all their tokens' vectors in memory
)
OOV_TOKEN, FIRST_TOKEN = 1, 2  # 0 is "no token"


@dataclass(frozen=True)
class Vocabulary:
    """Ids in row order. `ids[j]` has row `first + j`; the first `trained` of them occur in the training data.

    The others (items and users that only the tables know) have rows, features and the embedding of the unknown id.
    """

    ids: np.ndarray  # [n] object (str)
    first: int
    trained: int

    @property
    def rows(self) -> int:
        """Number of rows, the special ones included."""
        return self.first + len(self.ids)

    def encode(self, values: pd.Series | np.ndarray | list[str], unknown: int) -> np.ndarray:
        """[n] ids -> [n] int32 rows; an id that is not here becomes `unknown`."""
        distinct = pd.Categorical(values)
        found = self._index.get_indexer(distinct.categories)[distinct.codes]
        return np.where(found < 0, unknown, found + self.first).astype(np.int32)

    @cached_property
    def _index(self) -> pd.Index:
        return pd.Index(self.ids)

    def digest(self) -> str:
        """A hash of the trained ids in order: two models agree on embeddings' rows if and only if it is equal."""
        joined = "\n".join(self.ids[: self.trained]).encode()
        return hashlib.sha256(joined).hexdigest()[:16]


@dataclass(frozen=True)
class Column:
    """How one feature column is encoded: learnt from training rows, JSON-able, applied to any table."""

    name: str
    kind: str
    tokens: tuple[
        str, ...
    ] = ()  # of a kind of TOKENIZERS: the vocabulary; token j is encoded as FIRST_TOKEN + j
    mean: tuple[float, ...] = (0.0,)  # of a kind of NUMBERS: of the training rows
    std: float = 1.0  # of all numbers of a vector alike, so that directions stay

    @property
    def is_tokens(self) -> bool:
        return self.kind in TOKENIZERS

    def check(self, table: pd.DataFrame, where: str) -> None:
        """Raises UserError if a table, of the dataset `where`, has no such column or it cannot be of this kind."""
        if self.name not in table:
            raise UserError(
                f"{where} has no column {self.name}, which the model was trained with: add it, or train again"
            )
        values = table[self.name]
        holds = str(values.dtype)
        fits = self.kind not in NUMBERS or _holds(values, self.kind)
        if self.kind == "vector" and fits:
            width = vector_width(values)
            holds = f"vectors of {width} numbers, not {len(self.mean)}"
            fits = width in (0, len(self.mean))
        if not fits:
            raise UserError(
                f"{where}: column {self.name} holds {holds}, and the model was trained with "
                f"{self.kind}: prepare it as it was, or train again"
            )

    def encode(self, table: pd.DataFrame) -> np.ndarray:
        """[n] values -> int32 [n, tokens] (0 = none) or float32 [n, numbers], missing values being zeros."""
        if self.is_tokens:
            numbers = {token: FIRST_TOKEN + j for j, token in enumerate(self.tokens)}
            lists = _token_lists(table[self.name], self.kind)
            width = max(1, min(MAX_TOKENS, max(map(len, lists), default=1)))
            encoded = np.zeros((len(lists), width), np.int32)
            for row, tokens in enumerate(lists):
                for j, token in enumerate(tokens[:width]):
                    encoded[row, j] = numbers.get(token, OOV_TOKEN)
            return encoded
        values = _matrix(table[self.name], self.kind, len(self.mean))
        present = np.isfinite(values).all(axis=1, keepdims=True)
        values = np.where(present, values, np.asarray(self.mean, values.dtype))
        scaled = np.clip((values - np.asarray(self.mean, values.dtype)) / self.std, -5, 5)
        further = [part * present for part in NUMBERS[self.kind](values)]
        return np.concatenate([scaled, present, *further], axis=1).astype(np.float32)


def cyclic(seconds: Any) -> list[Any]:
    """Hour of the day and day of the week (UTC) as points on a circle: 4 arrays or tensors shaped as `seconds`."""
    waves = []
    for period in (86_400, 604_800):
        part = seconds % period
        angle = 2 * np.pi / period * (tf.cast(part, tf.float32) if tf.is_tensor(part) else part)
        waves += (
            [tf.sin(angle), tf.cos(angle)] if tf.is_tensor(part) else [np.sin(angle), np.cos(angle)]
        )
    return waves


def _holds(values: pd.Series, kind: str) -> bool:
    """Whether a column can be of a kind of NUMBERS."""
    if kind == "vector":
        return vector_width(values) > 0 or not values.notna().any()
    is_number = pd.api.types.is_numeric_dtype(values)
    return is_number or pd.api.types.is_datetime64_any_dtype(values)


def is_vector(value: object) -> bool:
    """Whether a value of a table is a vector of numbers."""
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def vector_width(values: pd.Series) -> int:
    """How many numbers each vector of a column has; 0 if there are none, or their widths differ."""
    widths = {len(value) if is_vector(value) else 0 for value in values.dropna()}
    return widths.pop() if len(widths) == 1 else 0


def _matrix(values: pd.Series, kind: str, width: int) -> np.ndarray:
    """[n, width] numbers of a column of a kind of NUMBERS; NaN for a missing value. Only vectors are wider than 1."""
    if kind != "vector":
        return _numbers(values)[:, None]
    vectors = np.full((len(values), width), np.nan, np.float32)
    present = values.notna().to_numpy()
    if present.any():
        vectors[present] = np.stack(values[present].to_list())
    return vectors


def _numbers(values: pd.Series) -> np.ndarray:
    """[n] float64; a date becomes its seconds since 1970, a missing value NaN."""
    if pd.api.types.is_datetime64_any_dtype(values):
        seconds = values.astype("datetime64[s]").astype(np.int64).astype(np.float64)
        return seconds.where(values.notna()).to_numpy()
    return values.to_numpy(np.float64, na_value=np.nan)


def _token_lists(values: pd.Series, kind: str) -> list[list[str]]:
    """The tokens of each value; a missing value has none."""
    return [[] if np.ndim(v) == 0 and pd.isna(v) else TOKENIZERS[kind](v) for v in values]


def _token(value: object) -> str:
    """A value as a token; booleans are written as in JSON."""
    return str(value).lower() if isinstance(value, (bool, np.bool_)) else str(value)


# Kinds of columns that are read as tokens: a value that is not missing -> its tokens.
TOKENIZERS: dict[str, Callable[[Any], list[str]]] = {
    "categorical": lambda value: [_token(value)],
    "multi": lambda values: [_token(value) for value in values] if np.ndim(values) else [],
    "text": lambda value: re.findall(r"\w+", str(value).lower()),
}
# Kinds that are read as numbers: [n, width] -> what the model reads beside the standardised numbers, [n, 1] each.
NUMBERS: dict[str, Callable[[np.ndarray], list[np.ndarray]]] = {
    "numeric": lambda _: [],
    "time": cyclic,
    "vector": lambda _: [],
}


def infer_kind(values: pd.Series) -> str:
    """The kind that `auto` gives a column: by type; strings are text where most of them differ, else categorical."""
    return _infer_kind(values)[0]


def _infer_kind(values: pd.Series) -> tuple[str, str]:
    """The kind that `auto` gives a column, and what decided it."""
    present = values.dropna()
    if len(present) and is_vector(present.iloc[0]):
        return "vector", f"it holds vectors of {len(present.iloc[0])} numbers"
    if len(present) and isinstance(present.iloc[0], (list, tuple, np.ndarray)):
        return "multi", "it holds lists"
    if pd.api.types.is_datetime64_any_dtype(values):
        return "time", f"it holds {values.dtype}"
    if pd.api.types.is_bool_dtype(values):
        return "categorical", "it holds true and false"
    if pd.api.types.is_numeric_dtype(values):
        return "numeric", f"it holds {str(values.dtype).lower()}"
    different = present.nunique()
    kind = "text" if len(present) and different > 0.5 * len(present) else "categorical"
    return kind, f"{different:,} of {len(present):,} values differ"


def fit_columns(
    table: pd.DataFrame,
    id_column: str,
    declared: str | dict[str, str],
    trained: np.ndarray,
    where: str,
) -> tuple[Column, ...]:
    """Learns the encodings of the declared columns of `table`, and prints a line per column.

    A column that is the same for all trained rows, or of which no value is known from two of them, is left out.

    Args:
      table: users or items, one row per id.
      id_column: the id's column, which is not a feature.
      declared: "auto" or {column: kind}.
      trained: [n] bool, the rows that occur in the training data; only they are learnt from.
      where: the config key, for messages.

    Raises:
      UserError: a declared column does not exist, or cannot be of its kind.
    """
    available = [name for name in table.columns if name != id_column]
    if isinstance(declared, str):
        kinds = {name: _infer_kind(table[name]) for name in available}
    else:
        kinds = {name: (kind, "the config says so") for name, kind in declared.items()}
    seen = table[trained]
    columns = []
    lines = []
    warnings = []
    for name, (kind, why) in kinds.items():
        _check_kind(table, available, name, kind, where)
        column = (
            _fit_numbers(seen, name, kind) if kind in NUMBERS else _fit_tokens(seen, name, kind)
        )
        lines.append(_describe(column, table[name], why))
        reason = _says_nothing(column, seen[name], table[name])
        if reason:
            warnings.append(f"warning: {where}.{name} is left out: {reason}")
        else:
            columns.append(column)
    describe_columns(f"{where}: learnt from {len(seen):,} of {len(table):,} rows", lines)
    for warning in warnings:
        note(warning)
    return tuple(columns)


def _check_kind(
    table: pd.DataFrame, available: list[str], name: str, kind: str, where: str
) -> None:
    """Raises UserError if the table has no such column, or it cannot be of this kind."""
    if name not in available:
        raise UserError(
            f"{where}.{name}: the dataset has no such column; it has {', '.join(available) or 'none'}"
        )
    known = (*TOKENIZERS, *NUMBERS)
    if kind not in known:
        raise UserError(
            f"{where}.{name}: there is no kind {kind!r}; choose one of {', '.join(known)}"
        )
    values = table[name]
    if kind in NUMBERS and not _holds(values, kind):
        needed = "lists of numbers, all of one width" if kind == "vector" else "numbers"
        raise UserError(f"{where}.{name}: {kind} needs {needed}, the column holds {values.dtype}")


def _fit_numbers(seen: pd.DataFrame, name: str, kind: str) -> Column:
    values = _matrix(seen[name], kind, vector_width(seen[name]))
    values = values[np.isfinite(values).all(axis=1)]
    if not values.size:
        return Column(name, kind)
    mean = values.mean(axis=0, dtype=np.float64)
    std = float(np.sqrt(values.var(axis=0, dtype=np.float64).mean()))
    return Column(name, kind, mean=tuple(mean.tolist()), std=std or 1.0)


def _fit_tokens(seen: pd.DataFrame, name: str, kind: str) -> Column:
    counts = Counter(token for tokens in _token_lists(seen[name], kind) for token in set(tokens))
    frequent = sorted(
        (token for token in counts if counts[token] >= MIN_COUNT),
        key=lambda token: (-counts[token], token),
    )
    return Column(name, kind, tokens=tuple(frequent[:MAX_VOCABULARY]))


def _says_nothing(column: Column, seen: pd.Series, values: pd.Series) -> str:
    """Why a column cannot tell one trained row from another, with a value; "" if it can."""
    present = seen[_is_filled(seen, column.kind)]
    if not len(present):
        others = values[_is_filled(values, column.kind)]
        if not len(others):
            return "it is empty"
        example = shorten(others.iloc[0])
        return f"no trained row has a value; {len(others):,} other rows have, such as {example}"
    example = shorten(present.iloc[0])
    if column.is_tokens and not column.tokens:
        return (
            f"as {column.kind}, {example} and all others are in fewer than {MIN_COUNT} trained rows"
        )
    if len(present) < len(seen):  # those without a value differ from the others
        return ""
    if column.is_tokens:
        tokens_of = TOKENIZERS[column.kind]
        first = tokens_of(present.iloc[0])
        is_constant = all(tokens_of(value) == first for value in present)
    else:
        numbers = _matrix(present, column.kind, len(column.mean))
        is_constant = not np.ptp(numbers, axis=0).any()
    return f"all {len(seen):,} trained rows have {example}" if is_constant else ""


def _is_filled(values: pd.Series, kind: str) -> np.ndarray:
    """[n] bool: whether there is a value. An empty list is none."""
    present = values.notna().to_numpy()
    if kind != "multi":
        return present
    return present & np.array([np.size(value) > 0 for value in values], bool)


def _describe(column: Column, values: pd.Series, why: str) -> ColumnLine:
    is_filled = _is_filled(values, column.kind)
    example = values[is_filled].iloc[0] if is_filled.any() else None
    size = f", {len(column.tokens):,} tokens" if column.is_tokens else ""
    return ColumnLine(column.name, column.kind, float(is_filled.mean()), example, f"{why}{size}")


def columns_to_json(columns: Iterable[Column]) -> str:
    return json.dumps([asdict(column) for column in columns], ensure_ascii=False)


def columns_from_json(text: str) -> tuple[Column, ...]:
    lists = ("tokens", "mean")
    return tuple(
        Column(**{**column, **{name: tuple(column[name]) for name in lists}})
        for column in json.loads(text)
    )


class Encoder(tf.keras.layers.Layer):
    """Rows of users or items -> vectors: the id's embedding plus a projection of the row's features.

    The projection starts at zero, so that training starts from ids alone and features only add what they explain.
    Rows beyond the trained vocabulary share the embedding of the unknown id; to train that one, each id is replaced
    by it with probability `id_dropout` in training.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        columns: tuple[Column, ...],
        table: pd.DataFrame,
        dim: int,
        unknown: int,
        use_id: bool = True,
        id_dropout: float = 0.0,
        name: str = "encoder",
    ) -> None:
        """`table` has one row an id of `vocabulary`, in its order; `unknown` is the row of the unknown id."""
        super().__init__(name=name)
        self._rows, self._trained_rows = vocabulary.rows, vocabulary.first + vocabulary.trained
        self._unknown, self._id_dropout = unknown, id_dropout
        self._frozen: Callable[[tf.Tensor], tf.Tensor] | None = None
        self.ids: Any = None
        if use_id:
            uniform = tf.keras.initializers.RandomUniform(-0.05, 0.05)
            self.ids = tf.keras.layers.Embedding(self._trained_rows, dim, uniform, name="ids")
        self._columns = columns
        self._tables = [
            tf.Variable(
                _with_special_rows(column.encode(table), vocabulary.first),
                trainable=False,
                name=column.name,
            )
            for column in columns
        ]
        sizes = {
            column.name: FIRST_TOKEN + len(column.tokens) for column in columns if column.is_tokens
        }
        embedding = tf.keras.layers.Embedding
        self._embeddings = {
            name: embedding(size, dim, name=f"{name}_tokens") for name, size in sizes.items()
        }
        self._project = tf.keras.layers.Dense(dim, kernel_initializer="zeros", name="features")

    def call(self, rows: tf.Tensor, training: bool = False) -> tf.Tensor:
        """int32 rows of any shape -> float32 vectors [..., dim]."""
        if self._frozen is not None and not training:
            return self._frozen(rows)
        if not self._columns:
            return self._embed_ids(rows, training)
        # A row's features cost more than its id: compute each distinct row once.
        distinct, where = tf.unique(tf.reshape(rows, [-1]))
        vectors = self._project(
            tf.concat([self._features(j, distinct) for j in range(len(self._columns))], -1)
        )
        if self.ids is not None:
            vectors += self._embed_ids(distinct, training)
        return tf.reshape(
            tf.gather(vectors, where), tf.concat([tf.shape(rows), [vectors.shape[-1]]], 0)
        )

    def start_from(self, other: "Encoder") -> None:
        """Takes over the weights of an encoder of the same vocabulary, columns and width."""
        pairs = zip(
            unsharded(self.trainable_variables), unsharded(other.trainable_variables), strict=True
        )
        for variable, value in pairs:
            variable.assign(tf.convert_to_tensor(value))

    def freeze(self) -> tf.Variable:
        """Computes all vectors, [rows, dim]; outside training, calls look them up from then on.

        A bundle holds this table in place of the encoder's weights, which takes a sixth off what a lone request costs.
        """
        self._frozen = None
        parts = np.array_split(
            np.arange(self._rows, dtype=np.int32), 1 + self._rows // FROZEN_AT_ONCE
        )
        table = tf.Variable(
            tf.concat([self(tf.constant(rows)) for rows in parts], 0),
            trainable=False,
            name="vectors",
        )
        self._frozen = partial(
            tf.gather, table
        )  # a function: Keras would take a variable for a weight of the model
        return table

    def _embed_ids(self, rows: tf.Tensor, training: bool) -> tf.Tensor:
        unknown = rows >= self._trained_rows
        if training and self._id_dropout > 0:
            is_id = rows > self._unknown
            unknown |= is_id & (tf.random.uniform(tf.shape(rows)) < self._id_dropout)
        return self.ids(tf.where(unknown, self._unknown, rows))

    def _features(self, j: int, rows: tf.Tensor) -> tf.Tensor:
        """[n] rows -> [n, width] what column j says of them; tokens are averaged."""
        values = tf.nn.embedding_lookup(self._tables[j], rows)
        if not self._columns[j].is_tokens:
            return values
        present = tf.cast(values > 0, tf.float32)[..., None]
        vectors = self._embeddings[self._columns[j].name](values) * present
        return tf.reduce_sum(vectors, 1) / tf.maximum(tf.reduce_sum(present, 1), 1.0)


def _with_special_rows(encoded: np.ndarray, first: int) -> np.ndarray:
    """Puts `first` rows of zeros (no tokens, missing numbers) before the encoded ones."""
    return np.concatenate([np.zeros((first, encoded.shape[1]), encoded.dtype), encoded])


def unsharded(variables: list[tf.Variable]) -> list[tf.Variable]:
    """The same variables; a table that lies in parts on several servers is there once, not part by part."""
    tables: list[tf.Variable] = []
    for variable in variables:
        container = getattr(variable, "_sharded_container", None)
        table = variable if container is None else container()
        if not any(table is other for other in tables):
            tables.append(table)
    return tables


def recent_items(history: tf.Tensor, width: int) -> tf.Tensor:
    """Histories as callers give them, [B, H] rows, oldest first, PAD anywhere (ids that were not known) -> the last
    `width` items, [B, width], left-aligned, PAD behind."""
    order = tf.argsort(tf.cast(history == PAD, tf.int32), axis=1, stable=True)
    items = tf.pad(tf.gather(history, order, batch_dims=1), [[0, 0], [0, width]])
    length = tf.reduce_sum(tf.cast(history != PAD, tf.int32), 1)
    at = tf.maximum(length - width, 0)[:, None] + tf.range(width)
    return tf.gather(items, at, batch_dims=1)
