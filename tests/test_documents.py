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
ALL = {name: commands((ROOT / name).read_text()) for name in [*DOCUMENTS, *CONFIGS] if name != "GUIDE.md"}


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    modules = sorted({module for found in ALL.values() for module, _ in found})
    done = subprocess.run(
        [sys.executable, "-c", HELP, *modules], env=environment(), cwd=ROOT, capture_output=True, text=True
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


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_and_keys_in_the_text_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    for file in re.findall(r"`((?:rec|config|tests|bench|docs|notebooks)/[\w./-]*\w)`", text):
        assert (ROOT / file).exists(), file
    for link in re.findall(r"\[[^\]\"]+\]\(([^)#:]+)(?:#[\w-]*)?\)", text):
        assert (ROOT / link).exists(), link
    for key in re.findall(r"`((?:retrieval|ranking|index|output|features)\.(?!py`)[a-z_0-9]+)`", text):
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
    env = environment(PYTHONPATH=str(project), PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    text = script((ROOT / "GUIDE.md").read_text())
    done = subprocess.run(["bash", "-c", text], cwd=project, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_the_tour_runs_from_a_clean_kernel(project: Path) -> None:
    tour = nbformat.read(project / "notebooks" / "tour.ipynb", as_version=4)
    NotebookClient(tour, timeout=600, resources={"metadata": {"path": str(project / "notebooks")}}).execute()
