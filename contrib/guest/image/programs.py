"""Programs that the builder runs: without an environment, with a limit, and they must succeed."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["output", "run"]

_LIMIT_S = 600.0
_ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
}


def run(*command: str | Path, **environment: str) -> None:
    """Run a program; what it prints is shown.

    Raises: subprocess.CalledProcessError.
    """
    _run(command, environment, capture=False)


def output(*command: str | Path, **environment: str) -> str:
    """Run a program and return what it prints.

    Raises: subprocess.CalledProcessError.
    """
    return _run(command, environment, capture=True).stdout


def _run(
    command: tuple[str | Path, ...], environment: dict[str, str], *, capture: bool
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        check=True,
        timeout=_LIMIT_S,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if capture else None,
        text=True,
        env=_ENVIRONMENT | environment,
    )
