"""A program that confines itself and then becomes another one: the last step before a child.

It runs as the child's user, in its namespaces, with no rights left to give up but these.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import PurePath

from tdxd.errors import TdxdError
from tdxd.host import landlock, seccomp

__all__ = ["Confinement", "main", "wrapped"]

_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    "from tdxd.host.confine import main; main()"
)
_ROOT = str(PurePath(__file__).parents[2])
_EXIT_NOT_CONFINED = 126


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Confinement:
    """What a child may still do: see `landlock` and `seccomp`."""

    files: landlock.FileRules
    ports: landlock.PortRules
    may_connect: bool = False


def wrapped(confinement: Confinement, argv: tuple[str, ...]) -> list[str]:
    """Return a command line that confines itself and executes `argv`."""
    text = json.dumps(dataclasses.asdict(confinement))
    return [sys.executable, "-I", "-S", "-c", _PROGRAM, _ROOT, text, *argv]


def main() -> None:
    """Confine this process as the first argument says, and execute the others."""
    rules = json.loads(sys.argv[1])
    argv = sys.argv[2:]
    try:
        landlock.restrict(
            landlock.FileRules(**rules["files"]), landlock.PortRules(**rules["ports"])
        )
        seccomp.install(may_connect=rules["may_connect"])
    except TdxdError as exc:
        _refuse(f"cannot confine {argv[0]}: {exc.message}")
    try:
        os.execvp(argv[0], argv)  # noqa: S606 — there is no shell
    except OSError as exc:
        _refuse(f"cannot execute {argv[0]}: {exc.strerror}")


def _refuse(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.exit(_EXIT_NOT_CONFINED)
