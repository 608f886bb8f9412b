"""Well-known public data sets, from the files that their owners give you -> a dataset directory.

    python -m rec.data_prep.public --list
    python -m rec.data_prep.public --name retailrocket --source ~/Downloads/retailrocket --output-dir data/retailrocket
    python -m rec.data_prep.public --name hm --source transactions_train.csv articles.csv --output-dir data/hm \\
        -- --since 2020-06-01 --split leave_one_out

- Nothing is downloaded: --list says where each set is, and its licence. --source names its files, or folders with them.
- public.yaml has an entry per set, which is options of rec.data_prep.tabular. Further options of that command, after
  --, replace those of the entry. So another set needs an entry and no code.
- Files of users and items are optional. What is not found is printed.

MovieLens has a command of its own. Not verified on the real files: only made-up rows in their formats were at hand.
"""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from rec.data_prep.tabular import file_parser, prepare_files
from rec.errors import UserError, command_parser, note, run_command


@dataclass(frozen=True)
class PublicSet:
    """An entry of public.yaml, which explains the fields."""

    title: str
    url: str
    licence: str
    files: dict[str, str]
    options: str

    def arguments(self, sources: Sequence[Path]) -> list[str]:
        """Options of rec.data_prep.tabular. Raises UserError if there are no interactions among the sources."""
        arguments = shlex.split(self.options)
        for option, pattern in self.files.items():
            paths = sorted(path for path in _files(sources) if fnmatchcase(path.name, pattern))
            if paths:
                arguments += [f"--{option}", *map(str, paths)]
            elif option == "interactions":
                raise UserError(f"--source has no file {pattern}: get it from {self.url}")
            else:
                note(f"no {option}: --source has no file {pattern}")
        return arguments


def load_sets() -> dict[str, PublicSet]:
    """The entries of public.yaml."""
    text = Path(__file__).with_name("public.yaml").read_text(encoding="utf-8")
    return {name: PublicSet(**entry) for name, entry in yaml.safe_load(text).items()}


def _files(sources: Sequence[Path]) -> list[Path]:
    """The files, and those in the folders. Raises UserError for a source that does not exist."""
    files: list[Path] = []
    for source in sources:
        if not source.exists():
            raise UserError(f"--source {source} does not exist")
        files += [source, *source.rglob("*")]
    return [file for file in files if file.is_file()]


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("rec.data_prep.public", __doc__)
    parser.add_argument("--list", action="store_true", help="print the sets, and end")
    parser.add_argument("--name", choices=list(load_sets()))
    parser.add_argument("--source", type=Path, nargs="+", help="files, or folders with them")
    parser.add_argument("--output-dir", type=Path, help="the dataset directory to write")
    parser.add_argument("options", nargs="*", help="after --: options of rec.data_prep.tabular")
    return parser


def main() -> None:
    """The command."""
    args = _parser().parse_args()
    sets = load_sets()
    if args.list:
        for name, each in sets.items():
            print(f"{name:<14}{each.title}\n{'':<14}{each.url}\n{'':<14}licence: {each.licence}")
        return
    if not (args.name and args.source and args.output_dir):
        raise UserError("name --name, --source and --output-dir, or --list to see the sets")
    chosen = sets[args.name]
    note(f"{chosen.title}. Licence: {chosen.licence}")
    arguments = [
        *chosen.arguments(args.source),
        "--output-dir",
        str(args.output_dir),
        *args.options,
    ]
    prepare_files(file_parser().parse_args(arguments), args.name, f"{chosen.title}, {chosen.url}")


if __name__ == "__main__":
    run_command(main)
