"""What the documents say is so: their commands' flags, keys and files exist, and the guide's commands and code run."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from rec.config import load_config
from tests.conftest import ROOT, environment

DOCUMENTS = sorted(path.name for path in ROOT.glob("*.md"))
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "config").rglob("*.yaml"))
# Prints {module: its --help}, of all modules given, in one process, since importing TensorFlow takes long.
HELP = """
import contextlib, io, json, runpy, sys
found = {}
for name in sys.argv[1:]:
    sys.argv, said = [name, "--help"], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    found[name] = said.getvalue()
print(json.dumps(found))
"""


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Module and arguments of each `python -m rec...` or `python -m bench...`, continued lines joined."""
    joined = re.sub(r"\\\n(?:> )?\s*", " ", text)
    word = r"""(?:"[^"]*"|'[^']*'|[^\s`#|&;<>"'])+"""
    found = re.findall(rf"python -m ((?:rec|bench)[\w.]*)((?: +{word})*)", joined)
    return [(module.rstrip("."), shlex.split(arguments)) for module, arguments in found]


# But for the guide's, which are run.
ALL = {
    name: commands((ROOT / name).read_text())
    for name in [*DOCUMENTS, *CONFIGS]
    if name != "GUIDE.md"
}


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    modules = sorted({module for found in ALL.values() for module, _ in found})
    done = subprocess.run(
        [sys.executable, "-c", HELP, *modules],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, str] = json.loads(done.stdout)
    return said


@pytest.mark.parametrize("name", [name for name, found in ALL.items() if found])
def test_flags_and_keys_that_are_mentioned_exist(name: str, helps: dict[str, str]) -> None:
    for module, arguments in ALL[name]:
        for flag in (each for each in arguments if each.startswith("--")):
            assert flag.strip("().,:") in helps[module], f"{module} {flag}"
        for flag, value in zip(arguments, arguments[1:], strict=False):
            if flag == "--set" and not re.search(r"[A-Z]{2}|\$", value):  # NAME stands for anything
                load_config(ROOT / "config" / "your_data.yaml", [value.rstrip(").,:")])
            if flag == "--config" and not re.search(r"[A-Z]{2}|\$", value):
                assert (ROOT / value).is_file(), value


# How a command of the README or of a config's first line is tested: by the test that runs the like (the guide's are run
# as they stand), or not at all, and why. The first that the command begins with counts.
RUN_BY = {
    "make quickstart": "test_commands.py::test_training_all_stages_answers_with_each",
    "make test": "not: it is what runs the tests",
    "python -m rec.data_prep.dummy": "data_prep/test_dummy.py::test_same_seed_same_bytes_other_seed_other_bytes",
    "python -m rec.data_prep.movielens --engine spark": "data_prep/test_spark.py::"
    "test_both_engines_write_the_same_bytes_and_say_the_same",
    "python -m rec.data_prep.movielens": "data_prep/test_movielens.py::test_download_is_checked_kept_and_not_repeated",
    "python -m rec.data_prep.tabular": "data_prep/test_tabular.py::test_other_column_names_some_with_quotes",
    "python -m rec.train --stage all --config config/movielens": "not: MovieLens may not be handed on, and 100K takes "
    "eight minutes; test_every_config_is_valid",
    "python -m rec.train --stage all": "test_commands.py::test_training_all_stages_answers_with_each",
    "python -m rec.train --stage ranking --model-arch dlrm": "test_commands.py::"
    "test_another_architecture_that_starts_from_retrieval",
    "python -m rec.train --stage retrieval --config config/your_data.yaml --strategy ps": "test_workers.py::"
    "test_parameter_servers_hold_the_tables_in_parts_and_a_worker_may_be_lost",
    "python -m rec.train --stage": "test_documents.py::test_the_guides_commands_and_examples_run",
    "export TF_CONFIG": "test_workers.py::test_two_workers_end_as_one_even_if_one_is_killed_and_all_start_again",
    "python -m rec.evaluate": "test_commands.py::test_evaluation_measures_the_bundles_beside_popularity",
    "python -m rec.export --stage retrieval --set index.kind=exact": "test_bundle.py::"
    "test_an_exact_bundle_needs_no_custom_operation_and_finds_the_same",
    "python -m rec.export --stage all": "test_commands.py::"
    "test_items_that_came_since_reach_a_running_server_by_one_command_without_training",
    "alias promote": "test_promote.py::test_the_story_of_a_promotion",
    "$ promote": "test_promote.py::test_the_story_of_a_promotion",
    "python -m rec.promote --artifact-name": "test_tracking.py::test_from_training_to_production",
    "python -m rec.serve --ranking-wandb": "test_tracking.py::test_from_training_to_production",
    "python -m rec.serve": "serving/test_serve.py::test_the_command_serves_until_it_is_terminated",
    "curl -s 'http://127.0.0.1:8000/v1/users": "serving/test_app.py::"
    "test_ten_items_are_the_default_and_both_addresses_agree",
    "curl -s http://127.0.0.1:8000/v1/recommend": "serving/test_app.py::"
    "test_an_explanation_says_where_each_item_comes_from",
    "curl -s 'http://127.0.0.1:8000/v1/items": "serving/test_app.py::"
    "test_similar_items_are_the_nearest_ones_without_the_item",
    "docker run": "not: TF Serving was not to be had; test_bundle.py calls the bundles through its C API",
    "curl -d": "not: it asks the TF Serving of the line before",
}
COMMAND = r"^(?:    |# )((?:\$ promote|make|python -m|curl|docker run|alias|export)\b.*)$"


@pytest.mark.parametrize("name", ["README.md", *CONFIGS])
def test_every_command_is_run_by_a_test_or_marked(name: str) -> None:
    text = re.sub(r"\\\n\s*", "", (ROOT / name).read_text())
    shown = re.findall(COMMAND, text, re.M)
    assert shown
    for command in shown:
        where = next((where for begin, where in RUN_BY.items() if command.startswith(begin)), None)
        assert where, f"{command}: which test runs it?"
        file, _, test = where.partition("::")
        assert file.startswith("not: ") or f"def {test}(" in (ROOT / "tests" / file).read_text(), (
            where
        )


def test_no_mark_is_left_over() -> None:
    text = "\n".join((ROOT / name).read_text() for name in ["README.md", *CONFIGS])
    assert not [begin for begin in RUN_BY if begin not in text]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_and_keys_in_the_text_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    for file in re.findall(r"`((?:rec|config|tests|bench|docs|notebooks)/[\w./-]*\w)`", text):
        assert (ROOT / file).exists(), file
    for link in re.findall(r"\[[^\]\"]+\]\(([^)#:]+)(?:#[\w-]*)?\)", text):
        assert (ROOT / link).exists(), link
    for key in re.findall(
        r"`((?:retrieval|ranking|index|output|features)\.(?!py`)[a-z_0-9]+)`", text
    ):
        section, _, field = key.partition(".")
        at = getattr(load_config(ROOT / "config" / "your_data.yaml"), section)
        assert hasattr(at, field) or (ROOT / "rec" / section / f"{field}.py").exists(), key


def script(text: str) -> str:
    """The guide as a shell script: its commands, and its code put at the end of the file that its first line names."""
    lines = ["set -eo pipefail"]
    for language, block in re.findall(r"```(console|python)\n(.*?)```", text, re.S):
        if language == "python":
            file = re.match(r"# (rec/[\w/]+\.py)\n", block)
            assert file, f"no file is named in the first line of:\n{block}"
            lines += [f"cat >> {file[1]} <<'END_OF_BLOCK'", "", block, "END_OF_BLOCK"]
        else:
            lines += [line[2:] for line in block.splitlines() if line.startswith(("$ ", "> "))]
    return "\n".join(lines)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy to work in, which trains for a moment only."""
    for name in ("rec", "config", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    config = tmp_path / "config" / "dummy" / "dummy_small.yaml"
    config.write_text(config.read_text().replace("epochs: 10 ", "epochs: 2 "))
    return tmp_path


def test_the_guides_commands_and_examples_run(project: Path) -> None:
    env = environment(
        PYTHONPATH=str(project),
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    )
    text = script((ROOT / "GUIDE.md").read_text())
    done = subprocess.run(
        ["bash", "-c", text], cwd=project, env=env, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_the_tour_runs_from_a_clean_kernel(project: Path) -> None:
    tour = nbformat.read(project / "notebooks" / "tour.ipynb", as_version=4)
    NotebookClient(
        tour, timeout=600, resources={"metadata": {"path": str(project / "notebooks")}}
    ).execute()
