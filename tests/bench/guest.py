"""In the booted guest, side by side in one run: opening and reading a volume; the boot by stage.

The machine is emulated in software, so that ratios of one run count, and no absolute time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contrib.guest.build_image import build_image, built_packages
from contrib.guest.disk import Disk
from contrib.guest.machine import Machine
from tests.guest.observed import Observed
from tests.guest.world import GuestWorld, made_world

__all__ = ["rows"]

_SIZE_BYTES = 192 * 2**20
_MIB = 2**20
_STAGES = (
    ("daemon.started", "tdxd starts"),
    ("volume.attesting", "attests"),
    ("volume.keyed", "has the key"),
    ("volume.mounted", "mounted"),
    ("server.started", "model server starts"),
    ("server.ready", "models available"),
    ("serving.ready", "front serves"),
)


def rows() -> list[dict[str, Any]]:
    """Boot one guest; measure its boot, then the volumes in it."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="tdxd-b-") as name:
        directory = Path(name)
        with (
            made_world(directory / "world") as world,
            _booted(world, directory) as guest,
        ):
            stages = _stages_row(guest)
            guest.machine.run("systemctl stop tdxd.socket tdxd.service", timeout_s=90)
            return [*_volume_rows(_measured(guest)), stages]


@contextmanager
def _booted(world: GuestWorld, directory: Path) -> Iterator[Observed]:
    image = build_image(built_packages())
    more = directory / "bench"
    more.mkdir()
    _make_volumes(world, more)
    tools = Disk(name="tools", path=image.tools, read_only=True)
    disks = (tools, world.delivery(more=more))
    machine = Machine(directory / "machine", image, disks=disks)
    try:
        with world.key_server():
            machine.route_keys_to(world.port)
            machine.boot()
            yield Observed(machine, world)
    finally:
        machine.close()


def _make_volumes(world: GuestWorld, into: Path) -> None:
    """Seal one directory, and make an ext4 of the same one into the reference's kind of LUKS2.

    Its script formats with `-s 512 -c aes-xts-plain64`; on its loop device that makes sectors of
    512 bytes.
    """
    source = into / "source"
    (source / "models/big/1").mkdir(parents=True)
    with (source / "models/big/1/saved_model.pb").open("wb") as file:
        for _ in range(_SIZE_BYTES // _MIB):
            file.write(os.urandom(_MIB))
    world.seal(source, "big", generation=1, volume_id="big")
    for name in ("big.img", "big.bundle"):
        shutil.move(world.directory / name, into / name)
    plain, passphrase = into / "plain.luks", into / "passphrase"
    size = _SIZE_BYTES + 64 * _MIB
    _run(
        "mke2fs",
        "-q",
        "-t",
        "ext4",
        "-b",
        4096,
        "-d",
        source,
        plain,
        f"{size // 1024}k",
    )
    with plain.open("ab") as file:
        file.truncate(size + 32 * _MIB)  # the header takes the place of what is shifted
    passphrase.write_text("correct horse battery staple")
    options = ("--batch-mode", "--encrypt", "--reduce-device-size", "32M")
    how = ("-s", "512", "-c", "aes-xts-plain64", "--sector-size", "512")
    key = ("--key-file", passphrase)
    _run("cryptsetup", "reencrypt", *options, *how, *key, plain)
    shutil.rmtree(source)


def _run(*argv: object) -> None:
    subprocess.run([str(one) for one in argv], check=True, capture_output=True)


def _stages_row(guest: Observed) -> dict[str, Any]:
    """Say when each stage was reached, in seconds since the kernel started."""
    guest.until_serving()
    guest.predict_ok()
    first_s = float(guest.machine.output("cat /proc/uptime").split()[0])
    parts = [guest.machine.output("systemd-analyze time").splitlines()[0]]
    for event, words in _STAGES:
        found = guest.events(event)[0]
        parts.append(f"{words} {int(found['__MONOTONIC_TIMESTAMP']) / 1e6:.1f} s")
    return {
        "name": "kernel start to first prediction, emulated, s",
        "measured": round(first_s, 1),
        "budget": None,
        "ok": None,
        "detail": "; ".join(parts),
    }


def _measured(guest: Observed) -> dict[str, dict[str, float]]:
    files = ("big.img", "big.bundle", "plain.luks", "passphrase")
    paths = " ".join(f"/srv/more/{name}" for name in files)
    command = f"cd /opt/tools && PYTHONPATH=python python3 -m tests.bench.guest_volume {paths}"
    start = time.monotonic()
    told = guest.machine.output(command, timeout_s=900)
    print(f"measured in {time.monotonic() - start:.0f} s")
    figures: dict[str, dict[str, float]] = json.loads(told.splitlines()[-1])
    return figures


def _volume_rows(found: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    ours, theirs, rates = found["open"], found["reference_open"], found["bytes_per_s"]
    opening = ours["whole"] / theirs["whole"]
    return [
        {
            "name": "dm: key to mounted / losetup, luksOpen, mount",
            "measured": round(opening, 4),
            "budget": 0.1,
            "ok": opening <= 0.1,
            "detail": f"{_shares(ours)}, against {_shares(theirs)}",
        },
        _rate_row(
            "dm: read through crypt / the same by cryptsetup open", rates, "crypt", 1.0
        ),
        _rate_row(
            "dm: sequential read, sealed / LUKS2 and ext4 of the reference",
            rates,
            "sequential",
        ),
        _rate_row(
            "dm: 4 KiB random read, sealed / LUKS2 and ext4 of the reference",
            rates,
            "random",
        ),
    ]


def _shares(stages: dict[str, float]) -> str:
    """Say what each stage takes of the whole."""
    whole_s = stages["whole"]
    parts = (
        f"{name} {seconds / whole_s:.0%}"
        for name, seconds in stages.items()
        if name != "whole"
    )
    return f"{whole_s * 1000:.0f} ms ({', '.join(parts)})"


def _rate_row(
    name: str, rates: dict[str, float], which: str, budget: float | None = None
) -> dict[str, Any]:
    ours, theirs = rates[which], rates[f"reference_{which}"]
    ratio = ours / theirs
    return {
        "name": name,
        "measured": round(ratio, 3),
        "budget": budget,
        "ok": None if budget is None else ratio >= budget,
        "detail": f"at least; {ours / _MIB:.1f} MiB/s against {theirs / _MIB:.1f} MiB/s",
    }
