"""The one place where a command line program meets every error."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from tdxd.errors import TdxdError, UsageError

TYPE_CHECKING = False  # typing itself would cost tdxctl a fifth of its start
if TYPE_CHECKING:
    from typing import Any, NoReturn

__all__ = ["Parser", "run", "show_error"]


class _Formatter(argparse.HelpFormatter):
    """Tells argparse the terminal's width: to learn it, it would import shutil in each run."""

    def __init__(self, prog: str, **options: Any) -> None:
        try:
            columns = int(os.environ.get("COLUMNS") or os.get_terminal_size(1).columns)
        except (ValueError, OSError):
            columns = 0
        super().__init__(prog, width=(columns or 80) - 2, **options)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `UsageError`, with exit code 64 instead of 2."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", _Formatter)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(message, hint=f"{self.prog} --help")


def run(prog: str, main: Callable[[Sequence[str]], int]) -> int:
    """Run `main` on the command line's arguments and return the exit code.

    A `TdxdError` becomes `prog: error: …` and `prog: hint: …` on standard error and its own
    exit code; Ctrl-C is 130, a closed pipe 141, as shells count signals. Anything else is a
    bug and keeps its traceback.
    """
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except TdxdError as exc:
        show_error(prog, exc)
        return exc.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader is gone: what is left in the buffer must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def show_error(prog: str, exc: TdxdError) -> None:
    """Print an error and its hint on standard error."""
    print(f"{prog}: error: {exc.message}", file=sys.stderr)
    if exc.hint:
        print(f"{prog}: hint: {exc.hint}", file=sys.stderr)
