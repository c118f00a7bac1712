"""A daemon that serves: simulated platform, key server, one sealed model."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.system.world import ROOT, Daemon, World, free_port, ok

__all__ = ["serving_daemon"]

_READY = ("wait", "--timeout", "100")


@contextlib.contextmanager
def serving_daemon() -> Iterator[Daemon]:
    """Run everything that a prediction needs; yields when the daemon is ready.

    Raises: RuntimeError if it does not become ready.
    """
    # Not below /tmp: the model server's user must be able to read on the way.
    with tempfile.TemporaryDirectory(prefix="tdxd-bench-", dir="/var/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        world = World(directory)
        _make_image(world)
        ok("tdx-sim", "init", directory / "sim")
        with world.simulator():
            world.pin = world.init_key_server()
            policy = directory / "policy.toml"
            policy.write_text(ok("tdx-sim", "measurements", directory / "sim"))
            bundle = directory / "m.bundle"
            ok("tdx-keyd", "add", directory / "keys", bundle, "--policy", policy)
            listen = f"127.0.0.1:{free_port()}"
            serving = {"listen": listen, "user": "nobody", "drain_timeout_s": 1}
            with world.key_server(), world.daemon(serving=serving) as daemon:
                waited = daemon.ctl(*_READY)
                if waited.returncode != 0:
                    raise RuntimeError(f"tdxd is {waited.stdout.strip()}")
                yield daemon


def _make_image(world: World) -> None:
    """Train nothing: y = 2x + 1, with a certificate, sealed."""
    directory = world.directory
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests/system/make_model.py"),
            str(directory / "saved_model"),
        ],
        check=True,
        capture_output=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    certificate = ("--cert-out", directory / "ca.pem")
    ok("tdx-seal", "cert", "localhost", "-o", directory / "server.pem", *certificate)
    world.seal(world.make_directory("model"), "m", generation=1)
