"""The packages as files, unpacked, and as if they were installed."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.packaging.unpacked import ROOT, Unpacked, build


@pytest.fixture(scope="session")
def unpacked() -> Iterator[Callable[[str], Unpacked]]:
    """Return a function that builds and unpacks a package, once."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="tdxd-deb-") as directory:

        @functools.cache
        def unpack(name: str) -> Unpacked:
            deb = build(ROOT, ROOT / "build" / "deb", name)
            root = Path(directory, name)
            subprocess.run(["dpkg-deb", "-x", str(deb), str(root)], check=True)
            return Unpacked(name, deb, root)

        Path(directory).chmod(0o755)
        yield unpack


@pytest.fixture
def clean_environment() -> dict[str, str]:
    """What a program of a package gets: nothing that could lead it to this checkout."""
    prefix = sys.prefix
    path = [one for one in os.environ["PATH"].split(":") if not one.startswith(prefix)]
    return {"PATH": ":".join(path), "LC_ALL": "C.UTF-8"}
