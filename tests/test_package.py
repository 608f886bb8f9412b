"""The package: one command with all others under it, and what works when only the package is there."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import rec
from rec.__main__ import COMMANDS
from tests.conftest import ROOT, Trained, environment, run
from tests.test_project import is_command, modules


def rec_command(*arguments: str, **options: Path) -> subprocess.CompletedProcess[str]:
    """What the console script does, as pip writes it."""
    start = "import sys; from rec.__main__ import main; sys.argv[0] = 'rec'; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", start, *arguments],
        env=environment(**{name: str(value) for name, value in options.items()}),
        capture_output=True,
        text=True,
    )


def test_every_command_is_a_command_of_rec() -> None:
    names = {path.stem for path in modules() if is_command(path)} - {"__main__"}
    assert names == {command.removeprefix("prep ") for command in COMMANDS}
    text = rec_command("--help").stdout
    for name in names:
        assert name in text


def test_a_command_of_rec_is_the_module_of_that_name() -> None:
    done = rec_command("prep", "dummy", "--help")
    assert done.returncode == 0
    assert done.stdout == run("rec.data_prep.dummy", "--help").stdout
    done = rec_command("prep", "tabular", "--users")
    assert done.returncode == 2 and "--users: expected" in done.stderr
    assert rec_command("--version").stdout == f"rec {rec.__version__}\n"
    unknown = rec_command("retrain")
    assert unknown.returncode == 2 and "unrecognized arguments: retrain" in unknown.stderr


def test_the_help_of_rec_imports_nothing_heavy() -> None:
    done = run("rec", "--help", changes={"PYTHONPROFILEIMPORTTIME": "1"})
    for package in ("tensorflow", "numpy", "pydantic"):
        assert package not in done.stderr


def test_the_wheel_has_the_configurations_and_they_are_found_from_any_directory(
    tmp_path: Path,
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    site = tmp_path / "site"
    for package in wheel["packages"]:
        shutil.copytree(ROOT / package, site / package)
    for source, place in wheel["force-include"].items():
        shutil.copytree(ROOT / source, site / place)
    text = "from rec.config import load_config; import sys; print(load_config(sys.argv[1]).dataset)"
    found = {}
    for path in ("config/dummy/dummy_small.yaml", "config/none.yaml"):
        found[path] = subprocess.run(
            [sys.executable, "-c", text, path],
            cwd=tmp_path,
            env=environment(PYTHONPATH=str(site)),
            capture_output=True,
            text=True,
        )
    assert found["config/dummy/dummy_small.yaml"].stdout == "data/dummy\n"
    assert "config/none.yaml: No such file" in found["config/none.yaml"].stderr


# Runs a command as if these packages were not installed.
WITHOUT = """
import runpy, sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def run_without(packages: str, module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT, packages, module, *map(str, arguments)]
    return subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    "package, module, arguments",
    [
        ("dotenv", "rec.serve", ("--port", "0")),
        ("wandb", "rec.promote", ("--artifact-name", "retrieval_bundle", "--history")),
    ],
)
def test_a_command_whose_extra_is_missing_says_what_to_install(
    package: str, module: str, arguments: tuple[str, ...]
) -> None:
    done = run_without(package, module, *arguments)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        f"error: the package {package} is not installed; pip install 'rec-two-tower["
    )


def test_without_scann_a_bundle_that_needs_it_says_so(trained: Trained) -> None:
    places = ("--config", trained.config)
    done = run_without("scann", "rec.recommend", "--user", "u1", *places)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        "its index needs the package scann; export it again with --set index.kind=exact"
    )
