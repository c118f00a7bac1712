"""What the verbs of tdx-keyd share: how one is added, and how it prints."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from tdxd.errors import HostError

__all__ = [
    "add_kek",
    "add_verb",
    "now_s",
    "print_json",
    "warn",
    "warn_of_readers",
]


def add_verb(
    verbs: Any, name: str, function: Any, help_text: str, *, json_too: bool = True
) -> argparse.ArgumentParser:
    """Add a verb that works on a STORE and, unless told otherwise, prints JSON on demand."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=help_text, description=help_text, allow_abbrev=False
    )
    parser.set_defaults(verb=function)
    parser.add_argument("store", metavar="STORE", type=Path)
    if json_too:
        parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def add_kek(parser: argparse.ArgumentParser) -> None:
    """Let a verb that authenticates rows find the private half of the key-encryption key."""
    parser.add_argument(
        "--kek",
        type=Path,
        metavar="FILE",
        help="private half of the key-encryption key (default: STORE/kek.private)",
    )


def print_json(value: object) -> int:
    """Print a value; return the exit code."""
    print(json.dumps(value, indent=2))
    return 0


def now_s() -> int:
    """Return the wall clock, unix seconds."""
    return int(time.time())


def warn(text: str) -> None:
    """Print a warning to standard error."""
    print(f"warning: {text}", file=sys.stderr)


def warn_of_readers(path: Path) -> None:
    """Warn of a file with a secret that others may read.

    Raises: HostError.
    """
    try:
        mode = path.stat().st_mode & 0o777
    except OSError as exc:
        raise HostError.of("read", str(path), exc) from exc
    if mode & 0o077:
        warn(f"{path} has mode {mode:04o}, so others may read it")
