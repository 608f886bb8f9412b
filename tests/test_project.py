"""What the project promises about itself: its size, and that its requirements are pinned and complete."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINES = 5_000  # small enough to read in an afternoon
PACKAGES = {  # import name -> name in requirements.txt, where they differ
    "dotenv": "python-dotenv",
    "prometheus_client": "prometheus-client",
    "tensorflow_recommenders": "tensorflow-recommenders",
    "tensorflow_serving": "tensorflow-serving-api",
    "tf_keras": "tf-keras",
    "yaml": "PyYAML",
}


def pins(name: str) -> dict[str, str]:
    """{package: version} of a requirements file; fails on a line that is not `package==version`."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        entry = line.partition("#")[0].strip()
        if entry and not entry.startswith("-r "):
            match = re.fullmatch(r"([A-Za-z0-9_-]+)(?:\[\w+\])?==([\w.]+)", entry)
            assert match, f"{name}: not pinned with ==: {entry}"
            found[match[1]] = match[2]
    return found


def imported(path: Path) -> set[str]:
    """The top-level names that a Python file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_the_package_stays_below_its_line_budget() -> None:
    """Comments and docstrings count, blank lines do not."""
    texts = {path: path.read_text() for path in sorted((ROOT / "rec").rglob("*.py"))}
    lines = {path: sum(bool(line.strip()) for line in text.splitlines()) for path, text in texts.items()}
    longest = ", ".join(f"{path.name} {lines[path]}" for path in sorted(lines, key=lambda p: -lines[p])[:3])
    assert 0 < sum(lines.values()) < LINES, f"rec/ has {sum(lines.values())} lines; the longest: {longest}"


def test_requirements_are_pinned() -> None:
    assert pins("requirements.txt")["tensorflow"] == "2.20.0"
    assert pins("requirements-dev.txt")["pytest"]


def test_everything_that_the_package_imports_is_required() -> None:
    names = set().union(*(imported(path) for path in (ROOT / "rec").rglob("*.py")))
    third_party = names - sys.stdlib_module_names - {"rec"}
    assert {PACKAGES.get(name, name) for name in third_party} <= pins("requirements.txt").keys()
