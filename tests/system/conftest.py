"""One platform, key server and set of images for all whole-system tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.world import ROOT, World, ok


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    directory = Path("/var/tmp") / f"tdxd-world-{os.getpid()}"
    directory.mkdir()
    directory.chmod(0o755)
    made = World(directory)
    try:
        make = [sys.executable, str(ROOT / "tests/system/make_model.py")]
        subprocess.run(
            [*make, str(directory / "saved_model")],
            check=True,
            capture_output=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        )
        server = directory / "server.pem"
        ok(
            "tdx-seal",
            "cert",
            "localhost",
            "-o",
            server,
            "--cert-out",
            directory / "ca.pem",
        )
        source = made.make_directory("model")
        made.seal(source, "old", generation=1)
        made.seal(source, "m", generation=2)
        made.seal(source, "other", generation=2, volume_id="other")
        ok("tdx-sim", "init", directory / "sim")
        with made.simulator():
            made.pin = made.init_key_server()
            policy = directory / "policy.toml"
            policy.write_text(ok("tdx-sim", "measurements", directory / "sim"))
            for name in ("m", "other"):
                bundle = directory / f"{name}.bundle"
                ok("tdx-keyd", "add", directory / "keys", bundle, "--policy", policy)
            yield made
    finally:
        shutil.rmtree(directory)
