"""What all commands share.

--help shows the module's docstring, progress is on stderr, and a user's mistake is one sentence. A programming mistake
keeps its traceback.
"""

import argparse
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input from a user: the message is one sentence that says what is wrong, where, and how to mend it."""


def note(line: str) -> None:
    """Progress for a person, on stderr."""
    print(line, file=sys.stderr, flush=True)


def warn(*sentences: str) -> None:
    """What a user should know although the command goes on: one line each, on stderr."""
    for sentence in sentences:
        note(f"warning: {sentence}")


def command_parser(module: str, text: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m MODULE`, whose --help begins with `text`, as it is."""
    kind = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(f"python -m {module}", description=text, formatter_class=kind)


def run_command(main: Callable[[], None]) -> None:
    """Runs a command's `main`; exits with 1 and `error: <sentence>` on stderr for a user's mistake, 130 on Ctrl-C."""
    try:
        main()
    except (
        UserError,
        OSError,
    ) as error:  # no such file, no permission, disk full: the system's own sentence
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:
        if str(error.name).startswith("rec"):  # a programming mistake
            raise
        sys.exit(
            f"error: the package {error.name} is not installed; pip install 'rec-two-tower[serve,wandb,redis,spark]' "
            "installs everything that a command of rec can need"
        )
    except KeyboardInterrupt:
        sys.exit(130)
