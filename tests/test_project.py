"""What the project promises about itself: its size, and that its requirements are pinned and complete."""

import ast
import io
import re
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE_LINES = 10_000  # of the core and of what surrounds it
TOKENS_PER_LINE = 9.3
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
EXTRAS = ("spark", "dev", "bench")  # requirements-EXTRA.txt
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
PACKAGES = {  # import name -> name in requirements.txt, where they differ
    "dotenv": "python-dotenv",
    "google": "protobuf",
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


@dataclass(frozen=True)
class Density:
    """How a piece of Python reads. Code lines hold at least one token and belong to no docstring."""

    code_lines: int = 0
    tokens: int = 0  # names, operators, literals: all but comments, line ends and indentation
    long_lines: int = 0  # code lines of more than 100 columns

    def __add__(self, other: "Density") -> "Density":
        return Density(
            code_lines=self.code_lines + other.code_lines,
            tokens=self.tokens + other.tokens,
            long_lines=self.long_lines + other.long_lines,
        )


def docstring_lines(text: str) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            lines |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return lines


def density(text: str) -> Density:
    documentation = docstring_lines(text)
    lines: set[int] = set()
    tokens = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in LAYOUT or token.start[0] in documentation:
            continue
        tokens += 1
        lines |= set(range(token.start[0], token.end[0] + 1))
    source = text.splitlines()
    long = sum(len(source[line - 1]) > 100 for line in lines)
    return Density(code_lines=len(lines), tokens=tokens, long_lines=long)


def test_density_is_counted() -> None:
    text = '"""A file."""\n\nX = [\n    1,  # one\n]\n\ndef f():\n    """Two\n    lines."""\n    # why\n'
    assert density(text) == Density(code_lines=4, tokens=11, long_lines=0)


def test_the_package_can_be_read() -> None:
    texts = [path.read_text() for path in sorted((ROOT / "rec").rglob("*.py"))]
    total = sum(map(density, texts), Density())
    per_line, long = total.tokens / total.code_lines, total.long_lines / total.code_lines
    print(f"rec/: {total}, {per_line:.2f} tokens per line, {long:.1%} of lines over 100 columns")
    assert total.code_lines < CODE_LINES
    assert per_line <= TOKENS_PER_LINE
    assert long <= 0.05
    assert not any("# fmt: skip" in text for text in texts)


@pytest.mark.parametrize("folder", ["rec", "rec/ops"])
def test_the_readme_says_how_large_the_code_is(folder: str) -> None:
    row = re.search(
        rf"^\| .*`{folder}/` \| ([\d,]+) \| ([\d.]+) \| ([\d,]+) \|$",
        (ROOT / "README.md").read_text(),
        re.M,
    )
    assert row
    texts = [path.read_text() for path in (ROOT / folder).rglob("*.py")]
    total = sum(map(density, texts), Density())
    lines = sum(text.count("\n") for text in texts)
    stated = [float(cell.replace(",", "")) for cell in row.groups()]
    actual = [total.code_lines, total.tokens / total.code_lines, lines]
    assert stated == pytest.approx(actual, rel=0.02), "README.md, The code"


def test_requirements_are_pinned() -> None:
    assert pins("requirements.txt")["tensorflow"] == "2.20.0"
    assert pins("requirements-spark.txt")["pyspark"]
    assert pins("requirements-dev.txt")["pytest"]


def locked(name: str) -> dict[str, set[str]]:
    """{package: versions} of a lock; fails on a package without hashes, or on anything but packages and comments.

    A package has two versions if one of them is for other Pythons.
    """
    found: dict[str, set[str]] = {}
    text = re.sub(r"^ *#.*\n", "", (ROOT / name).read_text(), flags=re.M)
    for entry in text.replace("\\\n", " ").splitlines():
        match = re.fullmatch(
            r"([a-z0-9.-]+)(?:\[\w+\])?==([\w.]+)(?: ; \w+ [^;-]+)?"
            r"(?:\s+--hash=sha256:[0-9a-f]{64})+",
            entry,
        )
        assert match, f"{name}: no package with a version and hashes: {entry}"
        found.setdefault(match[1], set()).add(match[2])
    return found


@pytest.mark.parametrize("name", ["requirements", *(f"requirements-{each}" for each in EXTRAS)])
def test_the_lock_holds_every_requirement_and_what_it_needs(name: str) -> None:
    text = (ROOT / f"{name}.txt").read_text()
    required = pins(f"{name}.txt")
    for included in re.findall(r"^-r (\S+)", text, re.M):
        required |= pins(included)
    found = locked(f"{name}.lock")
    for package, version in required.items():
        assert found.get(package.lower()) == {version}, f"{package}: run make lock"
    # They are installed into one environment.
    shared = locked("requirements.lock")
    assert {package: found[package] for package in shared} == shared


def test_everything_that_the_package_imports_is_required() -> None:
    names = set().union(*(imported(path) for path in (ROOT / "rec").rglob("*.py")))
    third_party = names - sys.stdlib_module_names - {"rec"}
    required = pins("requirements.txt") | pins("requirements-spark.txt")
    assert {PACKAGES.get(name, name) for name in third_party} <= required.keys()


def tree() -> list[str]:
    """The modules of rec/ in the reading order of docs/map.md."""
    text = (ROOT / "docs" / "map.md").read_text()
    block = re.search(r"^```text\nrec/\n(.*?)^```", text, re.S | re.M)
    assert block
    order = []
    folder = ""
    for line in block[1].splitlines():
        match = re.fullmatch(r"  (  )?(\w+)(/|\.py) +\S.*", line)
        assert match, line
        inside, name, kind = match.groups()
        if kind == "/":
            folder = f"{name}/"
        else:
            order.append(f"{folder if inside else ''}{name}.py")
    return order


def test_the_map_lists_every_module_and_nothing_imports_what_stands_below_it() -> None:
    order, package = tree(), ROOT / "rec"
    modules = [path for path in package.rglob("*.py") if not path.name.startswith("__")]
    assert sorted(order) == sorted(str(path.relative_to(package)) for path in modules)
    for path in modules:
        name = str(path.relative_to(package))
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.ImportFrom)
                and node.module
                and node.module.split(".")[0] == "rec"
            ):
                inside = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                used = {
                    f"{each.removeprefix('rec.').replace('.', '/')}.py" for each in inside
                } & set(order)
                above = order[: order.index(name)]
                assert used <= set(above), (
                    f"{name} imports {used - set(above)}, which stands below it"
                )
