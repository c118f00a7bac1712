"""What programs load before they answer: modules that cost start-up time come later, or never."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BEGIN = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
END = "\nprint(*sys.modules, sep='\\n', file=sys.stderr)"
HELP = """
from tdxd.cli import tdxctl
sys.argv = ["tdxctl", "--help"]
try:
    tdxctl.main()
except SystemExit as exc:
    assert exc.code == 0
"""
DAEMON = "import tdxd.cli.tdxd, tdxd.guest.app, tdxd.host.memory_map, tdxd.host.proc"


def loaded_after(program: str) -> set[str]:
    """Run a program in an interpreter of its own; return the modules that are loaded then."""
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith("COV")
    }
    done = subprocess.run(
        [sys.executable, "-I", "-c", BEGIN + program + END],
        capture_output=True,
        text=True,
        check=True,
        env=clean,
    )
    return set(done.stderr.split())


@pytest.fixture(scope="module")
def tdxctl_modules() -> set[str]:
    return loaded_after(HELP)


@pytest.fixture(scope="module")
def daemon_modules() -> set[str]:
    return loaded_after(DAEMON)


@pytest.mark.parametrize(
    "name",
    [
        "asyncio",
        "cryptography",
        "dataclasses",
        "grpc",
        "json",
        "pyroute2",
        "structlog",
        "trio",
        "typing",
    ],
)
def test_tdxctl_never_loads(tdxctl_modules: set[str], name: str) -> None:
    assert "tdxd.core.wire" in tdxctl_modules
    assert name not in tdxctl_modules


@pytest.mark.parametrize(
    "name",
    [
        "cryptography",
        "google.protobuf",
        "grpc",
        "h11",
        "pyroute2",
        "rich",
    ],
)
def test_daemon_does_not_load_before_it_answers(
    daemon_modules: set[str], name: str
) -> None:
    assert "trio" in daemon_modules
    assert name not in daemon_modules
