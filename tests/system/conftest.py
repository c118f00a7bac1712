"""One platform, key server and set of images for all whole-system tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.world import World, ok


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    directory = Path("/var/tmp") / f"tdxd-world-{os.getpid()}"
    directory.mkdir()
    directory.chmod(0o755)
    made = World(directory)
    try:
        made.make_saved_model()
        made.make_certificate("localhost")
        source = made.make_directory("model")
        made.seal(source, "old", generation=1)
        made.seal(source, "m", generation=2)
        made.seal(source, "other", generation=2, volume_id="other")
        ok("tdx-sim", "init", directory / "sim")
        with made.simulator():
            made.pin = made.init_key_server()
            made.allow("m", "other")
            yield made
    finally:
        shutil.rmtree(directory)
