"""A guest of the measured test image, and everything that its host puts in its way."""

from __future__ import annotations

import os
import re
import shutil
import stat
from pathlib import Path

from contrib.guest.build_image import GuestImage
from contrib.guest.disk import Disk
from contrib.guest.disks import make_ext4
from contrib.guest.image.build import build_test, built_package
from contrib.guest.image.machine import FirmwareMachine
from contrib.guest.image.variables import write_variable
from tests.guest.observed import Observed
from tests.guest.world import GuestWorld
from tests.system.world import ok, toml

__all__ = ["EVIL", "LABEL", "VOLUME", "MeasuredGuest", "measured_machine"]

LABEL = "tdxd-data"
VOLUME = "measured"
"""Of its own, since its policy pins MRCONFIGID."""
EVIL = "evil-was-here"
"""What each of the host's tricks would leave: in the name of a file, a user, an option."""
_FW_CFG_NAME_LENGTH = 55
_SYSTEMD = "8cf2644b-4b0b-428f-9387-6d876050dc67"
_UNIT = f"""[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
ExecStart=/bin/touch /run/{EVIL}
[Install]
WantedBy=sysinit.target
"""
_CREDENTIALS = {
    "passwd.plaintext-password.root": EVIL,
    "tmpfiles.extra": f"f /run/{EVIL} 0644 root root -",
    "sysctl.extra": "kernel.sysrq=1",
    EVIL: EVIL,
}


class MeasuredGuest(Observed):
    """The daemon in a machine that firmware booted."""

    machine: FirmwareMachine


def data_tree(world: GuestWorld, tree: Path) -> str:
    """Fill the data disk's directory, honest and hostile; return the configuration's digest."""
    for place in ("models", "config"):
        (tree / place).mkdir(parents=True)
    image = world.directory / f"{VOLUME}.img"
    os.link(image, tree / f"models/{VOLUME}.img")
    shutil.copy(world.pin["ca"], tree / "config/keyd-ca.pem")
    volumes = [{"id": VOLUME, "image": f"/srv/models/{VOLUME}*.img"}]
    config = tree / "config/tdxd.toml"
    # A comment in a block of its own, which a test changes.
    text = toml(world.config(security=None, volume=volumes))
    config.write_text(f"{text}\n# {'x' * 8192}\n")
    ca = tree / "config/keyd-ca.pem"
    digest = ok("tdxd", "config-digest", "--config", config, "--ca", ca).strip()
    shutil.copytree(world.directory / "sim", tree / "platform")
    description = tree / "platform/platform.toml"
    described = re.sub(
        r'mr_config_id = "\w+"',
        f'mr_config_id = "{digest}"',
        description.read_text(),
    )
    description.write_text(described)
    _hostile_files(tree)
    return digest


def _hostile_files(tree: Path) -> None:
    """What a system that trusts its data disk would execute, read or follow."""
    for place in ("etc/systemd/system/sysinit.target.wants", "systemd/system"):
        (tree / place).mkdir(parents=True)
        (tree / place / "evil.service").write_text(_UNIT)
    for place in ("tmpfiles.d", "etc/tmpfiles.d", "usr/lib/tmpfiles.d"):
        (tree / place).mkdir(parents=True)
        (tree / place / "evil.conf").write_text(f"f /run/{EVIL} 0644 root root -\n")
    (tree / "etc/passwd").write_text(f"{EVIL}::0:0::/:/bin/sh\n")
    program = tree / "models/program"
    program.write_text(f"#!/bin/sh\ntouch /run/{EVIL}\n")
    program.chmod(0o4755)
    (tree / "models/link").symlink_to("/etc")
    os.mknod(tree / "models/device", stat.S_IFCHR | 0o666, os.makedev(1, 5))


def hostile_disks(directory: Path) -> list[Disk]:
    """Disks that look like swap, like another root and home, and like nothing."""
    disks = []

    def disk(name: str) -> Path:
        path = directory / f"{name}.raw"
        disks.append(Disk(name=name, path=path))
        return path

    with disk("swap").open("wb") as file:
        file.truncate(4 * 2**20)
        file.seek(1024)
        file.write((1).to_bytes(4, "little") + (1023).to_bytes(4, "little"))
        file.seek(4096 - 10)
        file.write(b"SWAPSPACE2")
    home = directory / "home.d"
    home.mkdir()
    (home / EVIL).touch()
    make_ext4(home, disk("home"), label="home", spare_bytes=0, journal=False)
    # Right label, right magic, and after that nothing that is a file system.
    garbage = bytearray(os.urandom(2**20))
    garbage[1024 + 0x38 : 1024 + 0x3A] = b"\x53\xef"
    garbage[1024 + 0x78 : 1024 + 0x88] = b"root".ljust(16, b"\0")
    disk("garbage").write_bytes(garbage)
    return disks


def hostile_options() -> list[str]:
    """QEMU's, for what SMBIOS and fw_cfg offer."""
    options = []
    for name, value in _CREDENTIALS.items():
        smbios = f"type=11,value=io.systemd.credential:{name}={value}"
        options += ["-smbios", smbios]
        place = f"opt/io.systemd.credentials/{name}"
        if len(place) <= _FW_CFG_NAME_LENGTH:
            options += ["-fw_cfg", f"name={place},string={value}"]
    extra = "io.systemd.stub.kernel-cmdline-extra=init=/bin/sh"
    return [*options, "-smbios", f"type=11,value={extra}"]


def hostile_variables(flash: Path) -> None:
    """Give systemd options in the variable that it reads them from."""
    words = "systemd.debug_shell=1 systemd.unit=rescue.target systemd.mask=tdxd.service"
    value = words.encode("utf-16-le") + b"\0\0"
    write_variable(flash, "SystemdOptions", _SYSTEMD, value)


def measured_machine(
    world: GuestWorld, image: GuestImage, directory: Path
) -> FirmwareMachine:
    """Set up a guest of the test image, under attack from the first moment; it is off.

    `image` is the other guest's, of which it takes tools and model server.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    known = (world.directory / f"{VOLUME}.img").exists()
    if not known:
        source = world.directory / "model"
        world.seal(source, VOLUME, generation=1, volume_id=VOLUME)
    digest = _data_disk(world, directory)
    if not known:
        _allow(world, digest, directory / "policy.toml")
    machine = FirmwareMachine(
        directory / "machine",
        build_test([built_package()]),
        disks=[
            *hostile_disks(directory),
            Disk(name="tools", path=image.tools, read_only=True),
            Disk(name="guest", path=image.root, read_only=True),
            Disk(name="data", path=directory / "data.raw"),
        ],
        options=hostile_options(),
    )
    hostile_variables(machine.variables)
    machine.route_keys_to(world.port)
    return machine


def _data_disk(world: GuestWorld, directory: Path) -> str:
    """Make the data disk; return the configuration's digest, the same in one world."""
    tree = directory / "data.d"
    digest = data_tree(world, tree)
    disk = directory / "data.raw"
    make_ext4(tree, disk, label=LABEL, spare_bytes=0, journal=False)
    shutil.rmtree(tree)
    return digest


def _allow(world: GuestWorld, digest: str, policy: Path) -> None:
    platform = ok("tdx-sim", "measurements", world.directory / "sim")
    policy.write_text(f'{platform}mr_config_id = ["{digest}"]\n')
    bundle = world.directory / f"{VOLUME}.bundle"
    store = world.directory / "keys"
    ok("tdx-keyd", "add", store, bundle, "--policy", policy)
