"""The product's image, of which nothing tells anything but health and the console."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from contrib.guest.disk import Disk
from contrib.guest.disks import make_ext4
from contrib.guest.image.build import MeasuredImage, build_product, built_package
from contrib.guest.image.disk_image import make_disk
from contrib.guest.image.machine import FirmwareMachine
from contrib.guest.image.rootfs import make_root
from tests.guest.conftest import Slot
from tests.guest.measured import EVIL, LABEL

pytestmark = [pytest.mark.guest, pytest.mark.root]

BOOT_S = 150.0
# Nothing of it is a secret, and nobody is there: what this guest shows is that it runs.
CONFIG = """\
[key_release]
servers = ["keys.example.com:50051"]
ca = "/etc/tdxd/keyd-ca.pem"
signing_key = "ed25519:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="

[[volume]]
id = "digits"
image = "/srv/models/digits-*.img"

[health]
listen = "[::]:9640"
"""


@pytest.fixture(scope="module")
def product(guest_directory: Path) -> MeasuredImage:
    """The product's image with a configuration of its own in it."""
    config = guest_directory / "product-config"
    config.mkdir()
    (config / "tdxd.toml").write_text(CONFIG)
    (config / "keyd-ca.pem").write_text("nobody looks before there is a quote\n")
    return build_product([built_package()], config)


@pytest.fixture(scope="module")
def decoy(product: MeasuredImage, guest_directory: Path) -> Path:
    """A disk with the image's own UKI and another root file system under the same names."""
    directory = guest_directory / "decoy"
    tree = directory / "tree"
    init = tree / "usr/lib/systemd/systemd"
    init.parent.mkdir(parents=True)
    init.write_text(f"#!/bin/sh\necho {EVIL} > /dev/console\n")
    init.chmod(0o755)
    facts = product.read_facts()
    root = make_root(tree, directory / "root")
    with root.partition.open("r+b") as file:  # as long as the real one
        file.truncate(sum(facts["rootfs"].values()))
    disk = directory / "decoy.raw"
    partitions = make_disk(product.uki, root.partition, facts["root_hash"], disk)
    assert partitions[1].uuid == facts["disk"]["partitions"][1]["uuid"]
    return disk


@pytest.fixture(scope="module")
def powered(
    slot: Slot, product: MeasuredImage, decoy: Path, guest_directory: Path
) -> Iterator[FirmwareMachine]:
    """Booted from the decoy's disk, the real one behind it; and two data disks."""
    data = guest_directory / "two.d"
    data.mkdir()
    disks = [Disk(name="image", path=product.disk, read_only=True)]
    for name in ("data1", "data2"):
        path = guest_directory / f"{name}.raw"
        make_ext4(data, path, label=LABEL, spare_bytes=0, journal=False)
        disks.append(Disk(name=name, path=path))
    machine = FirmwareMachine(
        guest_directory / "product", product, root=decoy, disks=disks, memory_mib=1024
    )
    slot.hold(machine)
    machine.switch_on()
    yield machine
    slot.clear()


def answer(machine: FirmwareMachine, path: str) -> int:
    """Ask health; 0 if nobody is there."""
    url = f"http://127.0.0.1:{machine.health_port}/{path}"
    try:
        with urllib.request.urlopen(url, timeout=10) as got:
            return int(got.status)
    except urllib.error.HTTPError as exc:
        return exc.code
    except OSError:
        return 0


def until(machine: FirmwareMachine, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BOOT_S
    while not condition():
        assert machine.running, machine.serial_tail()
        assert time.monotonic() < deadline, machine.serial_tail()
        time.sleep(0.5)


def console(machine: FirmwareMachine) -> str:
    return machine.serial_log.read_text(errors="replace")


def test_it_boots_and_tells_its_health(
    powered: FirmwareMachine, tell: Callable[[str], None]
) -> None:
    """The daemon runs on the measured root: it would refuse to otherwise."""
    start = time.monotonic()
    until(powered, lambda: answer(powered, "livez") == 200)
    tell(f"{time.monotonic() - start:.0f} s from power on to health")
    assert answer(powered, "readyz") == 503
    assert answer(powered, "metrics") == 200


def test_it_takes_the_root_that_fits_and_no_other(powered: FirmwareMachine) -> None:
    """Another disk has the same partition name, type and uuid, and comes first."""
    told = console(powered)
    assert "is not this image's root file system" in told
    assert EVIL not in told


def test_two_data_disks_of_one_label_are_none(powered: FirmwareMachine) -> None:
    until(powered, lambda: "none is used" in console(powered))
    assert f"are all labelled {LABEL}" in console(powered)


def test_nobody_is_asked_to_log_in(powered: FirmwareMachine) -> None:
    told = console(powered).lower()
    for word in ("login:", "password", "emergency", "rescue", "press enter", "# "):
        assert word not in told, word


def test_a_root_of_another_image_ends_the_machine(
    slot: Slot, product: MeasuredImage, decoy: Path, guest_directory: Path
) -> None:
    """The same UKI, so the same measurements: what it opens is still only its own root."""
    place = guest_directory / "other-root"
    machine = FirmwareMachine(place, product, root=decoy, memory_mib=1024)
    slot.hold(machine)
    machine.switch_on()
    until_off(machine)
    assert "there is no root file system of this image" in console(machine)
    assert EVIL not in console(machine)


def test_a_command_line_of_the_firmwares_ends_the_machine(
    slot: Slot, product: MeasuredImage, guest_directory: Path
) -> None:
    """Without secure boot the stub takes it; the kernel measures it, and the initrd refuses it."""
    facts = product.read_facts()
    line = f"{facts['command_line']} systemd.debug_shell=1"
    options = ("-kernel", str(product.uki), "-append", line)
    place = guest_directory / "other-line"
    machine = FirmwareMachine(place, product, memory_mib=1024, options=options)
    slot.hold(machine)
    machine.switch_on()
    until_off(machine)
    assert "this is not the image's command line" in console(machine)


def until_off(machine: FirmwareMachine) -> None:
    deadline = time.monotonic() + BOOT_S
    while machine.running:
        assert time.monotonic() < deadline, machine.serial_tail()
        time.sleep(0.2)


def test_a_changed_byte_at_boot_ends_the_machine(
    slot: Slot, product: MeasuredImage, guest_directory: Path
) -> None:
    """In every block of the second half: whatever is read of it first."""
    place = guest_directory / "flipped"
    machine = FirmwareMachine(place, product, memory_mib=1024)
    facts = product.read_facts()
    first = facts["disk"]["partitions"][1]["first_byte"]
    blocks = facts["root_blocks"]
    for block in range(blocks // 2, blocks):
        machine.flip_root(first + block * 4096 + 7)
    slot.hold(machine)
    machine.switch_on()
    until_off(machine)
    assert "corrupted" in console(machine)
    assert answer(machine, "livez") == 0
