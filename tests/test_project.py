"""What the project promises about itself: its size, and that its requirements are pinned and complete."""

import ast
import io
import re
import sys
import tokenize
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


def code_lines(text: str) -> int:
    """Lines of code as cloc counts them: without blank lines, comments and docstrings."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            lines |= set(range(token.start[0], token.end[0] + 1)) if token.string else set()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def test_lines_of_code_are_counted() -> None:
    text = '"""A file."""\n\nX = [\n    1,  # one\n]\n\ndef f():\n    """Two\n    lines."""\n    # why\n'
    assert code_lines(text) == 4


def test_the_package_stays_below_its_line_budget() -> None:
    lines = {path: code_lines(path.read_text()) for path in sorted((ROOT / "rec").rglob("*.py"))}
    longest = ", ".join(f"{path.name} {lines[path]}" for path in sorted(lines, key=lambda p: -lines[p])[:3])
    assert 0 < sum(lines.values()) < LINES, f"rec/ has {sum(lines.values())} lines; the longest: {longest}"


def test_requirements_are_pinned() -> None:
    assert pins("requirements.txt")["tensorflow"] == "2.20.0"
    assert pins("requirements-spark.txt")["pyspark"]
    assert pins("requirements-dev.txt")["pytest"]


def test_everything_that_the_package_imports_is_required() -> None:
    names = set().union(*(imported(path) for path in (ROOT / "rec").rglob("*.py")))
    third_party = names - sys.stdlib_module_names - {"rec"}
    required = pins("requirements.txt") | pins("requirements-spark.txt")
    assert {PACKAGES.get(name, name) for name in third_party} <= required.keys()


def tree() -> list[str]:
    """The modules of rec/ in the reading order that the README gives."""
    found: list[str] = []
    folder = ""
    for line in (ROOT / "README.md").read_text().partition("    rec/\n")[2].splitlines():
        match = re.fullmatch(r"      (  )?([a-z_]+)(/|\.py) .*|      (  )?([a-z_]+)/", line)
        if not match:
            return found
        if match[2] and match[3] == ".py":
            found.append(f"{folder if match[1] else ''}{match[2]}.py")
        else:
            folder = f"{match[2] or match[5]}/"
    return found


def test_the_readme_lists_every_module_and_nothing_imports_what_stands_below_it() -> None:
    order, package = tree(), ROOT / "rec"
    modules = [path for path in package.rglob("*.py") if not path.name.startswith("__")]
    assert sorted(order) == sorted(str(path.relative_to(package)) for path in modules)
    for path in modules:
        name = str(path.relative_to(package))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "rec":
                inside = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                used = {f"{each.removeprefix('rec.').replace('.', '/')}.py" for each in inside} & set(order)
                above = order[: order.index(name)]
                assert used <= set(above), f"{name} imports {used - set(above)}, which stands below it"
