"""Every way in which a YAML file or a --set can be wrong, and the sentence that the user reads."""

import argparse
import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rec.config import (
    UNREAD,
    Config,
    DataFacts,
    Ranking,
    Retrieval,
    add_config_arguments,
    describe_keys,
    load_config,
    to_dict,
    with_data_defaults,
    with_ranking_defaults,
    without_effect,
)
from rec.errors import UserError

CONFIGS = sorted(Path(__file__).parent.parent.glob("config/**/*.yaml"))


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """x.yaml in an empty working directory, so that errors name it `x.yaml`."""
    monkeypatch.chdir(tmp_path)
    return Path("x.yaml")


def error(path: Path, text: str, *overrides: str) -> str:
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------
# What is read


def test_keys_that_are_not_in_the_file_have_their_defaults(write: Path) -> None:
    write.write_text("dataset: data/dummy")
    assert load_config(write) == Config(dataset="data/dummy")


def test_values_of_every_type(write: Path) -> None:
    write.write_text("""
dataset: data/ml-100k
use_wandb: true
features:
  users: {}
  items: {genres: multi, title: text}
retrieval: {arch: sasrec, temperature: 2, learning_rate: 1e-3, logq: false}
ranking: {hidden: [32, 16, 8], objective: rating}
""")
    config = load_config(write)
    assert config.use_wandb is True
    assert config.features.users == {}
    assert config.features.items == {"genres": "multi", "title": "text"}
    assert config.retrieval.arch == "sasrec"
    assert config.retrieval.temperature == 2.0 and isinstance(config.retrieval.temperature, float)
    assert config.retrieval.logq is False
    assert config.ranking.hidden == (32, 16, 8)
    assert config.ranking.objective == "rating"


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", ".1e-2", "0.001", "+1e-3"])
def test_a_number_in_scientific_notation_is_a_number(write: Path, text: str) -> None:
    write.write_text(f"dataset: d\nretrieval: {{learning_rate: {text}}}")
    assert load_config(write).retrieval.learning_rate == 0.001


def test_overrides_are_yaml_and_the_last_one_wins(write: Path) -> None:
    write.write_text("dataset: data/dummy\nretrieval: {epochs: 7, window: 9}")
    overrides = [
        "retrieval.epochs=3",
        "retrieval.epochs=4",
        "ranking.hidden=[8, 4]",
        "dataset=a=b",
        "index={k: 200}",
    ]
    config = load_config(write, overrides)
    assert (config.retrieval.epochs, config.retrieval.window) == (4, 9)
    assert config.ranking.hidden == (8, 4)
    assert config.dataset == "a=b"
    assert config.index.k == 200 and config.index.kind == "scann"


def test_a_missing_key_can_come_from_an_override(write: Path) -> None:
    write.write_text("seed: 1")
    assert load_config(write, ["dataset=data/dummy"]) == Config(dataset="data/dummy", seed=1)


def test_the_command_line_has_a_default_config_and_repeatable_overrides() -> None:
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    assert vars(parser.parse_args([])) == {
        "config": "config/dummy/dummy_small.yaml",
        "overrides": [],
    }
    args = parser.parse_args(["--set", "seed=1", "--config", "c.yaml", "--set", "index.k=5"])
    assert (args.config, args.overrides) == ("c.yaml", ["seed=1", "index.k=5"])


def test_every_key_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    text = describe_keys()
    settings = to_dict(Config(dataset="d"))
    sections = {name: own for name, own in settings.items() if isinstance(own, dict)}
    keys = [name for name in settings if name not in sections]
    keys += [f"{name}.{own}" for name, section in sections.items() for own in section]
    described = re.findall(r"^(\S+):.*\n    \S.+\n    Takes \S.+\.$", text, re.M)
    assert sorted(described) == sorted(keys)
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--keys"])
    assert "".join(capsys.readouterr().out.split()) == "".join(text.split())


def test_to_dict_survives_json() -> None:
    values = to_dict(Config(dataset="d", ranking=Ranking(hidden=(8, 4))))
    assert values["dataset"] == "d"
    assert values["ranking"]["hidden"] == [8, 4]
    assert json.loads(json.dumps(values)) == values


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_project_loads(path: Path) -> None:
    assert load_config(path).dataset.startswith("data/")


def test_reading_a_config_does_not_import_tensorflow() -> None:
    code = "import sys, rec.config; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("retrieval: {epoch: 3}", "retrieval.epoch: unknown key; did you mean retrieval.epochs?"),
        ("ranking: {epoch: 3}", "ranking.epoch: unknown key; did you mean ranking.epochs?"),
        ("retreival: {epochs: 3}", "retreival: unknown key; did you mean retrieval?"),
        ("datset: d", "datset: unknown key; did you mean dataset?"),
        ("temprature: 1", "temprature: unknown key; did you mean retrieval.temperature?"),
        ("output: {zzz: 1}", "output.zzz: unknown key; the keys here are checkpoints, savedmodels"),
        ("7: 1", "7: unknown key; the keys here are dataset, use_wandb, seed"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(
    write: Path, text: str, message: str
) -> None:
    assert error(write, text).startswith(f"x.yaml: {message}")


def test_a_missing_key_is_named(write: Path) -> None:
    message = "dataset: missing key; add `dataset: data/NAME` or --set dataset=data/NAME"
    assert error(write, "seed: 1") == f"x.yaml: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "retrieval: {epochs: ten}",
            "retrieval.epochs: expected auto or a whole number of 1 or more, got 'ten'",
        ),
        (
            "retrieval: {epochs: 2.5}",
            "retrieval.epochs: expected auto or a whole number of 1 or more, got 2.5",
        ),
        (
            "retrieval: {epochs: true}",
            "retrieval.epochs: expected auto or a whole number of 1 or more, got true",
        ),
        (
            "retrieval: {epochs: }",
            "retrieval.epochs: expected auto or a whole number of 1 or more, got nothing",
        ),
        (
            "retrieval: {learning_rate: fast}",
            "retrieval.learning_rate: expected a number above 0, got 'fast'",
        ),
        (
            "retrieval: {learning_rate: false}",
            "retrieval.learning_rate: expected a number above 0, got false",
        ),
        ("use_wandb: 1", "use_wandb: expected true or false, got 1"),
        ("dataset: 100", "dataset: expected text, got 100; put it in quotes"),
        ("dataset: [a]", "dataset: expected text, got ['a']"),
        (
            "ranking: {hidden: 64}",
            "ranking.hidden: expected a list of 1 or more entries, each a whole number of 1 or more, got 64",
        ),
        (
            "ranking: {hidden: [64, x]}",
            "ranking.hidden[1]: expected a whole number of 1 or more, got 'x'",
        ),
        ("features: {items: 3}", "features.items: expected auto or {key: text}, got 3"),
        (
            "features: {items: {year: 3}}",
            "features.items.year: expected text, got 3; put it in quotes",
        ),
        (
            "features: {items: {on: text}}",
            "features.items: expected text, got true; put it in quotes",
        ),
        ("retrieval: 3", "retrieval: expected keys, such as retrieval.arch, got 3"),
        ("retrieval:", "retrieval: expected keys, such as retrieval.arch, got nothing"),
        ("just text", "the file: expected keys, such as dataset, got 'just text'"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(write: Path, text: str, message: str) -> None:
    assert error(write, text) == f"x.yaml: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "retrieval: {epochs: -1}",
            "retrieval.epochs: expected auto or a whole number of 1 or more, got -1",
        ),
        (
            "retrieval: {in_batch_negatives: -1}",
            "retrieval.in_batch_negatives: expected a whole number of 0 or more, got -1",
        ),
        ("retrieval: {temperature: 0}", "retrieval.temperature: expected a number above 0, got 0"),
        (
            "retrieval: {learning_rate: .inf}",
            "retrieval.learning_rate: expected a finite number above 0, got inf",
        ),
        (
            "retrieval: {learning_rate: .nan}",
            "retrieval.learning_rate: expected a finite number above 0, got nan",
        ),
        (
            "retrieval: {dropout: 1}",
            "retrieval.dropout: expected auto or a number of 0 or more and below 1, got 1",
        ),
        ("ranking: {holdout: 0}", "ranking.holdout: expected a number above 0 and below 1, got 0"),
        (
            "ranking: {hidden: [64, 0]}",
            "ranking.hidden[1]: expected a whole number of 1 or more, got 0",
        ),
        (
            "index: {recall_target: 95}",
            "index.recall_target: expected a number above 0 and at most 1, got 95",
        ),
        ("index: {kind: scan}", "index.kind: expected scann or exact, got 'scan'"),
        ("seed: -1", "seed: expected a whole number of 0 or more and below 4294967296, got -1"),
        ("features: {users: all}", "features.users: expected auto or {key: text}, got 'all'"),
    ],
)
def test_an_impossible_value_is_refused(write: Path, text: str, message: str) -> None:
    assert error(write, text) == f"x.yaml: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ranking: {hidden: !!set {64, 8}}", "ranking.hidden: expected a list of 1 or more"),
        ("ranking: {hidden: []}", "ranking.hidden: expected a list of 1 or more"),
        (f"ranking: {{l2: 1{400 * '0'}}}", "ranking.l2: expected a number of 0 or more, got 1000"),
        ("use_wandb: 'yes'", "use_wandb: expected true or false, got 'yes'"),
        ("seed: '1'", "seed: expected a whole number of 0 or more and below 4294967296, got '1'"),
        ("dataset: 2024-01-02", "dataset: expected text, got datetime.date(2024, 1, 2); put it in"),
    ],
)
def test_nothing_is_converted_but_whole_numbers_and_lists(
    write: Path, text: str, message: str
) -> None:
    assert error(write, text).startswith(f"x.yaml: {message}")


@pytest.mark.parametrize("key", ["retrieval.window", "retrieval.epochs", "ranking.batch_size"])
def test_0_does_not_mean_choose_for_me(write: Path, key: str) -> None:
    message = f"{key}: expected auto or a whole number of 1 or more, got 0"
    assert error(write, "dataset: d", f"{key}=0") == f"--set {key}=0: {message}"


def test_training_needs_negatives(write: Path) -> None:
    write.write_text("dataset: d\nretrieval: {uniform_negatives: 0}")
    config = load_config(write).retrieval
    resolved = with_data_defaults(config, DATA)
    assert resolved.uniform_negatives == 0
    message = error(write, write.read_text(), "retrieval.in_batch_negatives=0")
    assert message == (
        "x.yaml --set retrieval.in_batch_negatives=0: retrieval.in_batch_negatives and "
        "retrieval.uniform_negatives: one of them must be above 0, since training needs negatives"
    )


def test_a_ranker_cannot_ask_for_more_candidates_than_retrieval_returns(write: Path) -> None:
    message = "ranking.candidates: must be at most index.k, which is 50, not 100"
    assert error(write, "dataset: d", "index.k=50") == f"x.yaml --set index.k=50: {message}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("retrieval.epoch=3", "retrieval.epoch: unknown key; did you mean retrieval.epochs?"),
        (
            "retrieval.epochs=ten",
            "retrieval.epochs: expected auto or a whole number of 1 or more, got 'ten'",
        ),
        (
            "retrieval.epochs=",
            "retrieval.epochs: expected auto or a whole number of 1 or more, got nothing",
        ),
        (
            "retrieval.epochs=-1",
            "retrieval.epochs: expected auto or a whole number of 1 or more, got -1",
        ),
        ("retrieval=3", "retrieval: expected keys, such as retrieval.arch, got 3"),
        (
            "seed.x=3",
            "seed: expected a whole number of 0 or more and below 4294967296, got {'x': 3}",
        ),
        ("=3", "needs a key and a value, such as --set retrieval.epochs=3"),
        ("seed", "needs a key and a value, such as --set retrieval.epochs=3"),
        ("ranking.hidden=[8", "line 1: expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_an_error_in_an_override_names_the_override(
    write: Path, override: str, message: str
) -> None:
    assert error(write, "dataset: d", override).startswith(f"--set {override}: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dataset: d\nseed: 1\nseed: 2", "line 3: seed occurs twice"),
        ("retrieval:\n  epochs: 1\n  window: 2\n  epochs: 3", "line 4: epochs occurs twice"),
        ("dataset: d\n\tseed: 1", "line 2: found character '\\t' that cannot start any token"),
        (
            "dataset: d\nretrieval: {epochs: 3",
            "line 2: expected ',' or '}', but got '<stream end>'",
        ),
        ("dataset: a: b", "line 1: mapping values are not allowed here"),
        ("dataset: 2024-13-45", "month must be in 1..12"),
        ("", "the file is empty; it needs at least `dataset: data/NAME`"),
        ("# only a comment", "the file is empty; it needs at least `dataset: data/NAME`"),
    ],
)
def test_what_is_not_yaml_is_refused_with_its_line(write: Path, text: str, message: str) -> None:
    assert error(write, text) == f"x.yaml: {message}"


def test_a_file_that_is_not_text_is_refused(write: Path) -> None:
    write.write_bytes(b"\xff\x00\xfe")
    with pytest.raises(UserError, match="^x.yaml: "):
        load_config(write)


def test_a_file_that_does_not_exist_is_refused(write: Path) -> None:
    with pytest.raises(UserError, match=r"^none.yaml: No such file or directory$"):
        load_config("none.yaml")


def test_a_folder_is_not_a_config(write: Path) -> None:
    write.mkdir()
    with pytest.raises(UserError, match=r"^x.yaml: Is a directory$"):
        load_config(write)


def test_values_from_python_are_checked_too() -> None:
    for change in ({"windw": 3}, {"window": 0}, {"window": "3"}, {"logq": 1}):
        with pytest.raises(ValidationError):
            Retrieval(**change)
    with pytest.raises(ValidationError):
        replace(Ranking(), hidden=())


# ------------------------------------------------------------------------------------------------------------
# auto


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (
            {"interactions": 100_000, "mean_history": 100.0},
            {"arch": "sasrec", "window": 50, "epochs": 50, "batch_size": 64, "dropout": 0.2},
        ),
        (
            {"interactions": 150_000, "mean_history": 7.0},
            {"arch": "sasrec", "epochs": 40, "batch_size": 16, "dropout": 0.4},
        ),
        ({"interactions": 10**9}, {"epochs": 12}),
        (
            {"ordered": False, "mean_history": 7.0},
            {"arch": "autoencoder", "window": 1000, "uniform_negatives": 16384, "batch_size": 64},
        ),
        ({"trained_items": 100}, {"taste_dim": 0}),
        ({"trained_items": 1682}, {"taste_dim": 208}),
        ({"trained_items": 10**6}, {"taste_dim": 256}),
    ],
)
def test_auto_is_replaced_by_what_the_data_suggest(
    facts: dict[str, Any], expected: dict[str, Any]
) -> None:
    chosen = asdict(with_data_defaults(Retrieval(), replace(DATA, **facts)))
    assert {key: chosen[key] for key in expected} == expected


def test_what_is_set_is_what_is_used() -> None:
    asked = Retrieval(
        arch="gru4rec",
        taste_dim=3,
        window=7,
        epochs=3,
        batch_size=9,
        uniform_negatives=5,
        dropout=0.1,
    )
    chosen = with_data_defaults(asked, DATA)
    assert asdict(chosen) == asdict(asked)
    rating = Ranking(objective="rating", batch_size=64, learning_rate=0.001, window=9)
    assert asdict(with_ranking_defaults(rating, 50)) == asdict(rating)


@pytest.mark.parametrize(
    ("objective", "retrieval_window", "expected"),
    [
        ("implicit", 50, (50, 64, 0.001)),
        ("listwise", 1000, (1000, 64, 0.001)),
        ("rating", 50, (300, 1024, 0.003)),
        ("rating", 1000, (1000, 1024, 0.003)),
    ],
)
def test_auto_of_the_ranker_is_replaced_by_what_suits_its_objective(
    objective: str, retrieval_window: int, expected: tuple[int, int, float]
) -> None:
    chosen = with_ranking_defaults(Ranking(objective=objective), retrieval_window)
    assert (chosen.window, chosen.batch_size, chosen.learning_rate) == expected


# ------------------------------------------------------------------------------------------------------------
# Keys without effect

YOUR_DATA = Path(__file__).parent.parent / "config" / "your_data.yaml"  # sets nothing else
ALL_SECTIONS = ("features", "retrieval", "ranking", "index")
DATA = DataFacts(
    mean_history=50.0,
    ordered=True,
    interactions=10**6,
    trained_items=5000,
    items=6000,
    has_user_features=False,
)
SETS = replace(DATA, ordered=False)  # what the autoencoder is for


def said(*overrides: str, data: DataFacts = DATA) -> list[str]:
    """What is said of the defaults with these overrides."""
    config = load_config(YOUR_DATA, overrides)
    return without_effect(config, data, ALL_SECTIONS)


@pytest.mark.parametrize(
    ("overrides", "data", "sentence"),
    [
        (
            ["retrieval.arch=gru4rec", "retrieval.heads=4"],
            DATA,
            "retrieval.heads: 4 has no effect: retrieval.arch gru4rec does not read it",
        ),
        (
            ["retrieval.arch=two_tower", "retrieval.layers=3"],
            DATA,
            "retrieval.layers: 3 has no effect: retrieval.arch two_tower does not read it",
        ),
        (
            ["retrieval.temperature=.5"],
            SETS,
            "retrieval.temperature: 0.5 has no effect: retrieval.arch autoencoder does not read it",
        ),
        (
            ["retrieval.dropout=.5"],
            SETS,
            "retrieval.dropout: 0.5 has no effect: retrieval.arch autoencoder has it only on user "
            "features, user_id and query_time",
        ),
        (
            ["retrieval.arch=sasrec", "retrieval.query_time=true"],
            SETS,
            "retrieval.query_time: true has no effect: the interactions have no timestamps",
        ),
        (
            ["retrieval.uniform_negatives=9000"],
            DATA,
            "retrieval.uniform_negatives: 9000 has no effect: training has only 5,000 items, so it "
            "takes all of them",
        ),
        (
            ["retrieval.in_batch_negatives=64"],
            replace(DATA, trained_items=2048),
            "retrieval.in_batch_negatives: 64 has no effect: the softmax is over all 2,048 items, "
            "which are no more than retrieval.uniform_negatives 2,048",
        ),
        (
            ["retrieval.logq=false"],
            replace(DATA, trained_items=100),
            "retrieval.logq: false has no effect: the softmax is over all 100 items, which are no "
            "more than retrieval.uniform_negatives 2,048",
        ),
        (
            ["retrieval.in_batch_negatives=0", "retrieval.logq=false"],
            DATA,
            "retrieval.logq: false has no effect: every negative is drawn with the same probability",
        ),
        (
            ["ranking.window=500"],
            DATA,
            "ranking.window: 500 has no effect: ranking.objective implicit does not read it",
        ),
        (
            ["ranking.l2=.1"],
            DATA,
            "ranking.l2: 0.1 has no effect: ranking.objective implicit does not read it",
        ),
        (
            ["ranking.objective=rating", "ranking.holdout=.3"],
            DATA,
            "ranking.holdout: 0.3 has no effect: ranking.objective rating does not read it",
        ),
        (
            ["index.kind=exact", "index.recall_target=.9"],
            DATA,
            "index.recall_target: 0.9 has no effect: index.kind exact does not read it",
        ),
        (
            ["index.k=200"],
            replace(DATA, items=150),
            "index.k: 200 has no effect: the catalogue has only 150 items",
        ),
    ],
)
def test_a_key_that_was_set_and_has_no_effect_is_said_with_its_value_and_the_reason(
    overrides: list[str], data: DataFacts, sentence: str
) -> None:
    assert said(*overrides, data=data) == [sentence]


def test_what_has_an_effect_or_was_not_set_is_not_said() -> None:
    assert said() == said(data=replace(DATA, trained_items=3, items=3)) == said(data=SETS) == []
    assert said("retrieval={arch: sasrec, heads: 4, layers: 3, temperature: .1}") == []
    assert said("retrieval.dropout=.5", data=replace(SETS, has_user_features=True)) == []
    assert said("ranking={objective: rating, l2: .1, candidates: 50}") == []
    config = Config(dataset="d", retrieval=Retrieval(arch="two_tower", layers=3))
    assert without_effect(config, DATA, ("ranking", "index")) == []


def test_the_keys_that_only_some_read_exist_and_so_do_their_readers() -> None:
    import rec.ops.ratings  # noqa: F401  (registers an objective)
    from rec.ranking.train import MODELS
    from rec.retrieval.encoders import ENCODERS

    registered = {"retrieval.arch": list(ENCODERS), "ranking.objective": list(MODELS)}
    for key, (decider, values) in UNREAD.items():
        section, _, name = key.partition(".")
        assert hasattr(getattr(Config(dataset="d"), section), name)
        for value in values:
            load_config(CONFIGS[0], [f"{decider}={value}"])
            assert decider == "index.kind" or value in registered[decider]
