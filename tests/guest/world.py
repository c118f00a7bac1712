"""The owner of a guest: platform, key server and sealed images here, a delivery disk for there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contrib.guest.disk import Disk
from contrib.guest.disks import make_ext4
from contrib.guest.machine import Machine
from tdxd.user.endpoint import Endpoint
from tests.system.world import ROOT, World, ok, program, toml

__all__ = ["GuestWorld", "made_world"]

FRONT_NAME, KEYS_NAME = "guest.example", "keys.example"
SPARE_BYTES = 256 * 2**20
MEMORY_LIMIT_BYTES, CPU_LIMIT = 1536 * 2**20, 1.5
"""Of the model server, in a guest of 3 GiB and two processors."""


class GuestWorld(World):
    """A world whose daemon runs in a guest. Two generations of volume `m` are sealed."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.model_canary = os.urandom(64)
        """Content of a file beside the model, sealed with it."""

    def make_saved_model(self) -> None:
        super().make_saved_model()
        program = ROOT / "tests/attacks/hostile_model.py"
        command = [sys.executable, str(program), str(self.directory / "hostile_model")]
        subprocess.run(command, check=True, capture_output=True, timeout=120)

    def make_directory(self, name: str, *, version: str = "1") -> Path:
        """As without a guest, and with model `hostile`, which does what a request says."""
        made = super().make_directory(name, version=version)
        shutil.copytree(self.directory / "hostile_model", made / "models/hostile/1")
        assets = made / "models/line" / version / "assets.extra"
        assets.mkdir()
        (assets / "canary").write_bytes(self.model_canary)
        return made

    def config(self, **changes: Any) -> dict[str, Any]:
        tables: dict[str, Any] = {
            "key_release": {
                "servers": [f"{KEYS_NAME}:50051"],
                "ca": "/etc/tdxd/keyd-ca.pem",
                "signing_key": self.pin["signing_key"],
                "backoff_max_s": 2.0,
            },
            "platform": {
                "tsm": "/run/tdx-sim/report",
                "event_log": "/run/tdx-sim/CCEL",
                "rtmr": "/run/tdx-sim/measurements",
            },
            "volume": [{"id": "m", "image": "/srv/models/m*.img"}],
            "serving": {
                "listen": "[::]:8500",
                "user": "tdxd-serve",
                "memory_limit_bytes": MEMORY_LIMIT_BYTES,
                "cpu_limit": CPU_LIMIT,
            },
            "health": {"listen": "[::]:9640"},
            "security": {"accept_unmeasured": True},
        }
        merged = {**tables, **changes}
        return {name: table for name, table in merged.items() if table is not None}

    def delivery(
        self,
        name: str = "delivery",
        *,
        images: Sequence[str] = ("m",),
        later: Sequence[str] = (),
        more: Path | None = None,
        **changes: Any,
    ) -> Disk:
        """Make the disk that the guest mounts at /srv; `changes` replace tables of the config.

        `images` are in place at boot; `later` wait in /srv/later for a test to move them, and
        the files of the directory `more` are in /srv/more. A table that is `None` is left out.
        """
        tree = self.directory / f"{name}.d"
        for place, names in (("models", images), ("later", later)):
            (tree / place).mkdir(parents=True)
            for one in names:
                # A link: nothing writes to them here, and mke2fs copies.
                os.link(self.directory / f"{one}.img", tree / place / f"{one}.img")
        if more is not None:
            shutil.copytree(more, tree / "more", copy_function=os.link)
        (tree / "config").mkdir()
        (tree / "config/tdxd.toml").write_text(toml(self.config(**changes)))
        shutil.copy(self.pin["ca"], tree / "config/keyd-ca.pem")
        shutil.copytree(self.directory / "sim", tree / "platform")
        disk = Disk(name="delivery", path=self.directory / f"{name}.raw")
        make_ext4(tree, disk.path, label="delivery", spare_bytes=SPARE_BYTES)
        shutil.rmtree(tree)
        return disk

    def endpoint(self, machine: Machine, *, timeout_s: float = 60) -> Endpoint:
        """The guest's front, as its users know it."""
        return Endpoint(
            address=f"127.0.0.1:{machine.front_port}",
            ca_pem=(self.directory / "ca.pem").read_bytes(),
            server_name=FRONT_NAME,
            timeout_s=timeout_s,
        )

    def predict(
        self, machine: Machine, *more: object, rows: str = "[[1, 2, 3, 4]]"
    ) -> subprocess.CompletedProcess[str]:
        """Ask as a user on the other side of the network does; 2x + 1 is right."""
        return program(
            *("tdx-infer", "predict", f"127.0.0.1:{machine.front_port}"),
            *("--ca", self.directory / "ca.pem", "--server-name", FRONT_NAME),
            *("--model", "line", "--input", "-", "--json", *more),
            input=rows,
        )

    @staticmethod
    def status(machine: Machine) -> dict[str, Any]:
        shown: dict[str, Any] = json.loads(machine.output("tdxctl status --json"))
        return shown


@contextmanager
def made_world(directory: Path) -> Iterator[GuestWorld]:
    """Make everything, and serve the platform's collateral; the key server is not running yet."""
    directory.mkdir()
    made = GuestWorld(directory)
    try:
        made.make_saved_model()
        made.make_certificate(FRONT_NAME)
        source = made.make_directory("model")
        made.seal(source, "m", generation=1)
        made.seal(source, "m2", generation=2)
        ok("tdx-sim", "init", directory / "sim")
        with made.simulator(device=False):
            made.pin = made.init_key_server(name=KEYS_NAME)
            made.allow("m")
            yield made
    finally:
        shutil.rmtree(directory)
