"""The documents are right: commands parse, links lead somewhere, and the commands and code of the guide run.

- A `console` block of a page in RUN is run as it stands, in the order of RUN.
- Every other command must be accepted by what would run it: the module's own argument parser, the configuration, the
  Makefile, or the API's schema. NOT_RUN lists the commands that cannot be checked here, with the reason.
"""

import json
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from rec.__main__ import COMMANDS
from rec.config import load_config
from rec.ops.loop.events import EventsRequest
from rec.serving.schemas import BatchRequest, RecommendRequest
from tests.conftest import ROOT, environment

PAGES = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = [*sorted(path.name for path in ROOT.glob("*.md")), *PAGES]
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "config").rglob("*.yaml"))
RUN = ("docs/guide.md", "docs/serving.md", "docs/recipes.md", "docs/extend.md")

MODELS: dict[str, type[BaseModel]] = {
    "/v1/recommend/batch": BatchRequest,
    "/v1/events": EventsRequest,
}

NOT_RUN = {
    "docker run": "containers cannot be started here; test_deploy.py checks the files, and "
    "test_signatures.py calls the bundles through TF Serving's C API",
    "docker build": "as docker run",
    "docker compose": "as docker run",
    "REC_ALIAS=production docker": "as docker run",
    "promtool": "test_deploy.py runs it where it is installed",
    "curl -d": "asks the TF Serving of the line before",
    ".ci/run": "runs the tests",
    "apt install": "needs root",
    "pip install": "needs a network; test_project.py checks the locks",
}
# Words that stand for a value of the reader, and a valid value for each.
PLACEHOLDERS = {
    "NAME": "100k",
    "SPLIT": "temporal",
    "CONFIG": "ml_100k",
    "VERSION": "1",
    "STAGE": "retrieval",
}

# Reads [[module, arguments], ..] as JSON. Prints, for each, the error of the module's argument parser, or null.
# One process for all of them, because importing TensorFlow takes long.
PARSE = """
import argparse, contextlib, io, json, runpy, sys

class ParserOf(BaseException):
    pass

def give_parser(parser, *_):
    raise ParserOf(parser)

parse_args = argparse.ArgumentParser.parse_args
parsers = {}
errors = []
for module, arguments in json.load(sys.stdin):
    if module not in parsers:
        argparse.ArgumentParser.parse_args = give_parser
        sys.argv = [module]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except ParserOf as interruption:
            parsers[module] = interruption.args[0]
        argparse.ArgumentParser.parse_args = parse_args
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            parsers[module].parse_args(arguments)
        except SystemExit as end:
            if end.code:
                errors.append(stderr.getvalue())
                continue
    errors.append(None)
print(json.dumps(errors))
"""


# ------------------------------------------------------------------------------------------------------------
# Reading a document


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)


def outside_of_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def shell_lines(name: str) -> list[str]:
    """The commands that a document shows and nobody runs: in `sh` blocks, indented, or at the head of a config."""
    text = re.sub(r"\\\n\s*", "", read(name))
    lines = []
    for language, block in fenced_blocks(text):
        if language in ("sh", "bash"):
            lines += [line for line in block.splitlines() if line and not line.startswith("#")]
        elif language == "console" and name not in RUN:
            lines += [line[2:] for line in block.splitlines() if line.startswith("$ ")]
    starts = r"make|python -m|rec \w+|curl|docker|export|git|apt|pip|\.ci/run"
    command = rf"^(?:    |# )(?:\$ )?((?:{starts})\b.*)$"
    return lines + re.findall(command, outside_of_blocks(text), re.M)


def code_spans(name: str) -> list[str]:
    """What stands between backticks in a sentence."""
    spans = re.findall(r"`([^`]+)`", outside_of_blocks(read(name)))
    return [span.replace("\n", " ") for span in spans]


def as_modules(command: str) -> str:
    """A command of the package as its module: `rec prep dummy` is `python -m rec.data_prep.dummy`."""
    for name in COMMANDS:
        module = name.replace("prep ", "data_prep.")
        command = re.sub(rf"^(?:python -m )?rec {name}\b", f"python -m rec.{module}", command)
    return command


def module_calls(commands: list[str]) -> list[tuple[str, list[str]]]:
    """Module and arguments of each `python -m rec...`, `rec ...` or `python -m bench...`."""
    word = r"""(?:"[^"]*"|'[^']*'|[^\s#|&;<>"'])+"""
    pattern = re.compile(rf"python -m ((?:rec|bench)[\w.]*)((?: +{word})*)")
    calls = [call for command in commands for call in pattern.findall(as_modules(command))]
    return [(module, shlex.split(_fill_placeholders(arguments))) for module, arguments in calls]


def _fill_placeholders(text: str) -> str:
    for placeholder, value in PLACEHOLDERS.items():
        text = re.sub(rf"\b{placeholder}\b", value, text)
    return text


# ------------------------------------------------------------------------------------------------------------
# Commands

CALLS = {
    name: module_calls(shell_lines(name) + code_spans(name)) for name in [*DOCUMENTS, *CONFIGS]
}


@pytest.fixture(scope="module")
def parser_errors() -> dict[str, list[str]]:
    """The errors of the modules' argument parsers, by document."""
    calls = [(name, *call) for name, calls_of_one in CALLS.items() for call in calls_of_one]
    done = subprocess.run(
        [sys.executable, "-c", PARSE],
        input=json.dumps([call[1:] for call in calls]),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    errors: dict[str, list[str]] = {name: [] for name in CALLS}
    answers = json.loads(done.stdout.splitlines()[-1])
    for (name, module, arguments), answer in zip(calls, answers, strict=True):
        is_mention = not arguments  # of the module, such as `python -m rec.promote`
        if answer and not is_mention:
            errors[name].append(f"python -m {module} {shlex.join(arguments)}: {answer}")
    return errors


@pytest.mark.parametrize("name", [name for name, calls in CALLS.items() if calls])
def test_every_command_is_accepted_by_its_argument_parser(
    name: str, parser_errors: dict[str, list[str]]
) -> None:
    assert not parser_errors[name]


@pytest.mark.parametrize("name", [name for name, calls in CALLS.items() if calls])
def test_configs_and_keys_of_commands_exist(name: str) -> None:
    for _, arguments in CALLS[name]:
        values: dict[str, list[str]] = {"--config": [], "--set": []}
        for flag, value in zip(arguments, arguments[1:], strict=False):
            values.get(flag, []).append(value)
        for config in values["--config"] or ["config/your_data.yaml"]:
            load_config(ROOT / config, values["--set"])


def is_checked(command: str) -> bool:
    """Whether another test here checks the command."""
    if command.startswith("make "):
        target = command.split()[1]
        return bool(re.search(rf"^{target}:", read("Makefile"), re.M))
    starts = ("python -m rec", "python -m bench", "export TF_CONFIG", "curl -s")
    return as_modules(command).startswith(starts)


@pytest.mark.parametrize("name", [name for name in CALLS if shell_lines(name)])
def test_every_command_is_checked_or_says_why_not(name: str) -> None:
    for command in shell_lines(name):
        assert is_checked(command) or command.startswith(tuple(NOT_RUN)), command


def test_no_excuse_is_left_over() -> None:
    commands = "\n".join(command for name in CALLS for command in shell_lines(name))
    for start in NOT_RUN:
        assert re.search(rf"^{re.escape(start)}", commands, re.M), start


@pytest.mark.parametrize("name", DOCUMENTS)
def test_cluster_descriptions_are_json_that_names_the_task(name: str) -> None:
    for text in re.findall(r"TF_CONFIG='([^']*)'", read(name)):
        config = json.loads(text)
        addresses = config["cluster"][config["task"]["type"]]
        assert re.fullmatch(r"[\w.]+:\d+", addresses[config["task"]["index"]])


def requests_of(name: str) -> list[tuple[str, str | None]]:
    """The path and the body of each request to `rec.serve` that a document shows."""
    text = re.sub(r"\\\n(?:> )?\s*", "", read(name))
    shown = []
    for line in re.findall(r"curl .*", text):
        words = shlex.split(line.removesuffix(" &"))
        urls = [word for word in words if "127.0.0.1:" in word]
        bodies = [value for flag, value in zip(words, words[1:], strict=False) if flag == "-d"]
        for url in urls:
            path = "/" + url.partition("127.0.0.1:")[2].partition("/")[2]
            shown.append((path.partition("?")[0], bodies[0] if bodies else None))
    return shown


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if requests_of(name)])
def test_requests_are_among_those_that_are_run_and_fit_the_schema(name: str) -> None:
    run = {path for page in RUN for path, _ in requests_of(page)}
    for path, body in requests_of(name):
        assert path in run, f"{path}: show it in a console block of one of {RUN} too"
        if body is not None:
            MODELS.get(path, RecommendRequest).model_validate_json(body)


# ------------------------------------------------------------------------------------------------------------
# Links, files and keys


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_and_keys_in_the_text_exist(name: str) -> None:
    text = read(name)
    for file in re.findall(r"`((?:rec|config|tests|bench|docs|notebooks)/[\w./-]*\w)`", text):
        assert (ROOT / file).exists(), file
    sections = "retrieval|ranking|index|output|features"
    for key in re.findall(rf"`((?:{sections})\.(?!py`)[a-z_0-9]+)`", text):
        section, _, field = key.partition(".")
        settings = getattr(load_config(ROOT / "config" / "your_data.yaml"), section)
        is_module = (ROOT / "rec" / section / f"{field}.py").exists()
        assert hasattr(settings, field) or is_module, key


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files_and_headings(name: str) -> None:
    for target, anchor in re.findall(
        r"\[[^\]\"]+\]\(((?!https?:)[^)#]*)#?([\w-]*)\)", outside_of_blocks(read(name))
    ):
        file = (ROOT / name).parent / target if target else ROOT / name
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{target}#{anchor}"


def anchors(text: str) -> set[str]:
    """Of each heading, as GitHub and mkdocs write them."""
    headings = re.findall(r"^#+ (.*)$", outside_of_blocks(text), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_sites_navigation_names_every_page() -> None:
    site = yaml.safe_load(read("mkdocs.yml"))
    pages = [f"docs/{page}" for entry in site["nav"] for page in entry.values()]
    assert sorted(pages) == PAGES


# ------------------------------------------------------------------------------------------------------------
# What is run


CURL = 'curl() { command curl --fail --show-error "$@"; }'  # a refused request fails the script
STOP_SERVERS = (
    "trap 'kill $(jobs -p) 2> /dev/null || true' EXIT"  # also if a command before their end fails
)


def script(pages: list[str]) -> str:
    """A shell script that does what the pages say, each in a shell of its own."""
    shells = [f"(\n{STOP_SERVERS}\n{commands_of(page)}\n)" for page in pages]
    return "\n".join(["set -eo pipefail", CURL, *shells])


def commands_of(page: str) -> str:
    """A page's commands, and its code, which goes to the end of the file that its first line names."""
    lines = []
    for language, block in fenced_blocks(page):
        if language == "python":
            file = re.match(r"# (rec/[\w/]+\.py)\n", block)
            assert file, f"no file is named in the first line of:\n{block}"
            lines += [f"cat >> {file[1]} <<'END_OF_BLOCK'", "", block, "END_OF_BLOCK"]
        elif language == "console":
            lines += [line[2:] for line in block.splitlines() if line.startswith(("$ ", "> "))]
    return "\n".join(lines)


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def test_the_pages_commands_and_examples_run(project: Path) -> None:
    env = environment(
        PYTHONPATH=str(project), PATH=f"{Path(sys.executable).parent}:{environment()['PATH']}"
    )
    text = script([read(name) for name in RUN])
    for port in set(re.findall(r"--port (\d+)", text)):
        text = text.replace(port, free_port())
    done = subprocess.run(
        ["bash", "-c", text], cwd=project, env=env, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
