from typing import Any

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from rec.errors import UserError
from rec.features import (
    FIRST_ITEM,
    UNKNOWN,
    Column,
    Encoder,
    Vocabulary,
    columns_from_json,
    columns_to_json,
    cyclic,
    fit_columns,
    infer_kind,
)

ITEMS = pd.DataFrame(
    {
        "item_id": ["a", "b", "c", "d"],
        "studio": ["x", "x", "y", None],
        "genres": [["Drama", "War"], ["Drama"], [], None],
        "title": ["The Red Sea", "Red Sun", "The Sun", None],
        "year": [1990.0, 2000.0, np.nan, 2010.0],
    }
)
ALL = np.ones(4, bool)


def column(name: str, kind: str, trained: np.ndarray = ALL) -> Column:
    return fit_columns(ITEMS, "item_id", {name: kind}, trained, "features.items")[0]


def test_a_vocabulary_gives_rows_and_maps_unknown_ids():
    vocabulary = Vocabulary(np.array(["a", "0b", 'c,"é'], object), FIRST_ITEM, 2)
    assert vocabulary.encode(['c,"é', "0b", "b", "a"], UNKNOWN).tolist() == [5, 4, UNKNOWN, 3]
    assert vocabulary.rows == 6


def test_a_vocabularys_digest_depends_on_the_trained_ids_and_their_order():
    def digest(ids: list[str], trained: int) -> str:
        return Vocabulary(np.array(ids, object), FIRST_ITEM, trained).digest()

    assert digest(["a", "b", "new"], 2) == digest(["a", "b"], 2) != digest(["b", "a"], 2)


def test_categorical_values_become_tokens_with_one_for_rare_and_zero_for_missing():
    # x occurs twice and is the first token (2); y occurs once: out of vocabulary (1); None: no token (0).
    assert column("studio", "categorical").encode(ITEMS).tolist() == [[2], [2], [1], [0]]


def test_multi_valued_columns_are_padded():
    assert column("genres", "multi").encode(ITEMS).tolist() == [[2, 1], [2, 0], [0, 0], [0, 0]]


def test_text_is_split_into_lower_case_tokens():
    encoded = column("title", "text")
    assert encoded.tokens == ("red", "sun", "the")
    assert encoded.encode(ITEMS).tolist() == [[4, 2, 1], [2, 3, 0], [4, 3, 0], [0, 0, 0]]


def test_numbers_are_standardised_and_missing_ones_flagged():
    # mean 2000, standard deviation sqrt(200 / 3)
    expected = 10 / np.sqrt(200 / 3)
    assert column("year", "numeric").encode(ITEMS) == pytest.approx(
        np.array([[-expected, 1], [0, 1], [0, 0], [expected, 1]]), abs=1e-5
    )


def test_time_adds_hour_and_weekday():
    hour, noon = cyclic(np.array([6 * 3600])), cyclic(np.array([12 * 3600]))
    assert [hour[0][0], hour[1][0]] == pytest.approx(
        [1, 0], abs=1e-9
    )  # six o'clock is a quarter of the circle
    assert [noon[0][0], noon[1][0]] == pytest.approx([0, -1], abs=1e-9)
    assert np.stack(cyclic(tf.constant([6 * 3600], tf.int64)), -1) == pytest.approx(
        np.stack(hour, -1), abs=1e-6
    )
    dates = ITEMS.assign(year=pd.to_datetime(["1990-01-01", "2000-01-01", None, "2010-01-01"]))
    encoded = fit_columns(dates, "item_id", {"year": "time"}, ALL, "features.items")[0].encode(
        dates
    )
    assert encoded.shape == (4, 6)
    assert encoded[2].tolist() == [0] * 6


def test_encodings_are_learnt_from_training_rows_only():
    only_first = np.array([True, True, False, False])
    assert column("title", "text", only_first).tokens == ("red",)
    assert column("year", "numeric", only_first).mean == (1995,)


def test_auto_takes_the_kind_from_the_type():
    assert {name: infer_kind(ITEMS[name]) for name in ITEMS.columns[1:]} == {
        "studio": "text",  # two of three values differ: too many for categories
        "genres": "multi",
        "title": "text",
        "year": "numeric",
    }
    assert infer_kind(pd.Series(["x", "y"] * 10)) == "categorical"


def test_a_column_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(UserError, match=r"features.items.gnres: .*studio, genres, title, year"):
        fit_columns(ITEMS, "item_id", {"gnres": "multi"}, ALL, "features.items")


def test_a_numeric_column_of_words_is_an_error():
    with pytest.raises(UserError, match=r"features.items.studio: numeric needs numbers"):
        fit_columns(ITEMS, "item_id", {"studio": "numeric"}, ALL, "features.items")


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(UserError, match="there is no kind 'mutli'; choose one of categorical, "):
        fit_columns(ITEMS, "item_id", {"genres": "mutli"}, ALL, "features.items")


def test_columns_survive_json():
    columns = fit_columns(ITEMS, "item_id", "auto", ALL, "features.items")
    assert columns_from_json(columns_to_json(columns)) == columns


def encoder(**kwargs: Any) -> Encoder:
    vocabulary = Vocabulary(ITEMS["item_id"].to_numpy(object), FIRST_ITEM, 3)
    columns = fit_columns(ITEMS, "item_id", "auto", ALL, "features.items")
    return Encoder(vocabulary, columns, ITEMS, 4, UNKNOWN, **kwargs)


def test_an_item_without_training_has_the_unknown_ids_embedding_until_features_are_learnt():
    layer = encoder()
    vectors = layer(tf.constant([[3, 6], [UNKNOWN, 4]])).numpy()
    assert vectors.shape == (2, 2, 4)
    assert (vectors[0, 1] == vectors[1, 0]).all()
    assert (vectors[0, 0] != vectors[1, 1]).any()
    layer._project.set_weights([np.ones_like(w) for w in layer._project.get_weights()])
    learnt = layer(tf.constant([[3, 6], [UNKNOWN, 4]])).numpy()
    assert (learnt[0, 1] != learnt[1, 0]).any()


def test_id_dropout_replaces_ids_by_the_unknown_one_in_training_only():
    layer = encoder(id_dropout=1.0)
    row = tf.constant([3])
    assert (layer(row, training=True).numpy() == layer(tf.constant([UNKNOWN])).numpy()).all()
    assert (layer(row).numpy() != layer(tf.constant([UNKNOWN])).numpy()).any()


# ------------------------------------------------------------------------------------------------------------
# Vectors


def vector(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32)


IMAGES = [vector(1, 0, 5), vector(3, 0, 5), None, vector(2, 2, 5), vector(200, 0, 5)]
VECTORS = pd.DataFrame({"item_id": ["a", "b", "c", "d", "e"], "image": IMAGES})


def image_column() -> Column:
    trained = np.array([True, True, True, False, False])
    (column,) = fit_columns(VECTORS, "item_id", "auto", trained, "features.items")
    return column


def test_a_vector_is_standardised_as_a_whole_and_flagged_if_it_is_missing() -> None:
    column = image_column()
    assert (column.kind, column.mean) == ("vector", (2, 0, 5))
    assert column.std == pytest.approx(np.sqrt(1 / 3))  # the variances are 1, 0 and 0
    unit = np.sqrt(3)
    assert column.encode(VECTORS) == pytest.approx(
        np.array(
            [[-unit, 0, 0, 1], [unit, 0, 0, 1], [0, 0, 0, 0], [0, 2 * unit, 0, 1], [5, 0, 0, 1]]
        ),
        abs=1e-5,
    )
    assert columns_from_json(columns_to_json([column])) == (column,)


def test_vectors_of_items_that_came_later_reach_the_encoder() -> None:
    column = image_column()
    vocabulary = Vocabulary(VECTORS["item_id"].to_numpy(object), FIRST_ITEM, 3)
    layer = Encoder(vocabulary, (column,), VECTORS, 4, UNKNOWN)
    layer(tf.constant([FIRST_ITEM]))
    layer._project.set_weights([np.ones_like(w) for w in layer._project.get_weights()])
    later = layer(tf.constant([FIRST_ITEM + 3, FIRST_ITEM + 4])).numpy()
    assert (later[0] != later[1]).all()
    layer.freeze()  # as in a bundle
    assert layer(tf.constant([FIRST_ITEM + 3, FIRST_ITEM + 4])).numpy() == pytest.approx(later)


def test_a_table_with_other_vectors_than_training_had_is_refused() -> None:
    column = image_column()
    column.check(VECTORS, "data/new")
    column.check(VECTORS.assign(image=None), "data/new")
    assert column.encode(VECTORS.assign(image=None)).tolist() == [[0] * 4] * 5
    wider = VECTORS.assign(image=pd.Series([vector(0, 0, 0, 0, 0, 0, 0)] * 5))
    with pytest.raises(UserError, match="data/new: column image holds vectors of 7 numbers, not 3"):
        column.check(wider, "data/new")
    with pytest.raises(UserError, match="column image holds .* was trained with vector: prepare"):
        column.check(VECTORS.assign(image="words"), "data/new")


def test_a_column_that_is_declared_a_vector_and_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="x: vector needs lists of numbers, all of one width"):
        fit([np.zeros(2), np.zeros(3)], "vector", 2)
    with pytest.raises(UserError, match="x: numeric needs numbers"):
        fit([np.zeros(2), np.ones(2)], "numeric", 2)


# ------------------------------------------------------------------------------------------------------------
# What is said of columns


def fit(values: Any, kind: str, trained: int) -> tuple[Column, ...]:
    """The columns of a table with one feature `x`, of which the first `trained` rows are in training."""
    table = pd.DataFrame({"item_id": [str(j) for j in range(len(values))], "x": values})
    declared = "auto" if kind == "auto" else {"x": kind}
    mask = np.arange(len(table)) < trained
    return fit_columns(table, "item_id", declared, mask, "features.items")


def test_a_line_per_column_says_its_kind_and_what_decided_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = ITEMS.assign(seen=pd.array([True, None, False, True], "boolean"))
    fit_columns(table, "item_id", "auto", ALL, "features.items")
    assert capsys.readouterr().err.splitlines() == [
        "features.items: learnt from 4 of 4 rows",
        "  column  kind         filled  example           why",
        "  studio  text         75%     'x'               2 of 3 values differ, 1 tokens",
        "  genres  multi        50%     ['Drama', 'War']  it holds lists, 1 tokens",
        "  title   text         75%     'The Red Sea'     3 of 3 values differ, 3 tokens",
        "  year    numeric      75%     1990.0            it holds float64",
        "  seen    categorical  75%     True              it holds true and false, 1 tokens",
    ]


@pytest.mark.parametrize(
    ("values", "kind", "trained", "reason"),
    [
        ([None, None, None], "auto", 2, "it is empty"),
        (
            [None, None, "new"],
            "auto",
            2,
            "no trained row has a value; 1 other rows have, such as 'new'",
        ),
        (
            [[], [], ["new"]],
            "auto",
            2,
            "no trained row has a value; 1 other rows have, such as ['new']",
        ),
        (["a", "a", "b"], "categorical", 2, "all 2 trained rows have 'a'"),
        ([["a", "b"], ["a", "b"], []], "multi", 2, "all 2 trained rows have ['a', 'b']"),
        ([5, 5, 6], "numeric", 2, "all 2 trained rows have 5"),
        ([np.ones(2), np.ones(2), np.zeros(2)], "auto", 2, "all 2 trained rows have [1.0, 1.0]"),
        (
            ["Toy Story", "Heat", "Heat"],
            "categorical",
            2,
            "as categorical, 'Toy Story' and all others are in fewer than 2 trained rows",
        ),
    ],
)
def test_a_column_that_says_nothing_is_left_out_with_a_value(
    capsys: pytest.CaptureFixture[str], values: list[Any], kind: str, trained: int, reason: str
) -> None:
    assert fit(values, kind, trained) == ()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"warning: features.items.x is left out: {reason}"


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a", None, "a"], "categorical"),  # to have a value or none is something
        ([5, None, 5], "numeric"),
        ([5, 6, 5], "numeric"),
        ([True, False, True], "categorical"),
    ],
)
def test_a_column_that_tells_rows_apart_stays(values: list[Any], kind: str) -> None:
    assert [column.kind for column in fit(values, kind, 3)] == [kind]


def test_booleans_are_tokens_as_json_writes_them() -> None:
    values = pd.array([True, False, None, True, False], "boolean")
    (column,) = fit(values, "auto", 5)
    assert (column.kind, column.tokens) == ("categorical", ("false", "true"))
    assert column.encode(pd.DataFrame({"x": values})).tolist() == [[3], [2], [0], [3], [2]]


def test_whole_numbers_with_gaps_are_read_as_those_without() -> None:
    values = pd.array([46, None, 48, 46], "Int64")
    (column,) = fit(values, "categorical", 4)
    assert column.tokens == ("46",)
    (column,) = fit(values, "auto", 4)
    assert (column.kind, column.mean) == ("numeric", pytest.approx((140 / 3,)))


def test_a_table_that_a_trained_column_does_not_fit_is_refused() -> None:
    year = column("year", "numeric")
    with pytest.raises(UserError, match="data/new has no column year, which the model was trained"):
        year.check(ITEMS.drop(columns="year"), "data/new")
    with pytest.raises(UserError, match="data/new: column year holds .*was trained with numeric"):
        year.check(ITEMS.assign(year="1990"), "data/new")
    year.check(ITEMS, "data/new")
