"""What firmware, stub and kernel extend in a real boot is what was computed from the image.

A virtual TPM stands in for TDX, PCRs for RTMRs: the same firmware code measures the same events,
and only where they go differs. Stub and kernel measure to a TPM in place of RTMR2.
"""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest

from contrib.guest import base
from contrib.guest.image.base import base_directory as image_base
from contrib.guest.image.build import build_product, built_package
from contrib.guest.image.disk_image import make_disk
from contrib.guest.image.uki import make_uki
from tdxd.core.eventlog import Event, parse_event_log
from tdxd.core.measure.boot import ExpectedEvent, Prediction, predict
from tdxd.core.measure.compare import compare
from tdxd.core.measure.machines import MACHINES, VIRTUAL_TPM
from tdxd.owner.measured.image_input import read_boot_image
from tests.guest.measured_boot import Extend, measured_boot

pytestmark = [pytest.mark.guest, pytest.mark.root]

BOOT_S = 120.0
LEFT = hashlib.sha384(b"Exit Boot Services Returned with Success").digest()
SEPARATOR = hashlib.sha384(bytes(4)).digest()
STUB = "boot/usr/lib/systemd/boot/efi/linuxx64.efi.stub"
COMMAND_LINE = b"console=ttyS0 quiet panic=-1 tpm_test=1"
LAST_PCR = 23
BEGIN, END = b"BEGIN OF THE LOG\n", b"END OF THE LOG"
# The serial line makes CR LF of each LF, and nothing else of anything. Firmware writes to it, too.
INIT = b"""#!/bin/sh
mkdir -p /proc /sys /dev
mount -t devtmpfs dev /dev
mount -t sysfs sys /sys
mount -t securityfs sec /sys/kernel/security
echo BEGIN OF THE LOG > /dev/ttyS1
cat /sys/kernel/security/tpm0/binary_bios_measurements > /dev/ttyS1
echo END OF THE LOG > /dev/ttyS1
for pcr in 4 5 9 11 12; do
    echo PCR $pcr `cat /sys/class/tpm/tpm0/pcr-sha384/$pcr` > /dev/ttyS0
done
sleep 1
poweroff -f
"""


def prediction_of(path: Path) -> Prediction:
    image = read_boot_image(path)
    return predict(image.uki, image.table, VIRTUAL_TPM)


def as_events(extends: list[Extend]) -> list[Event]:
    return [Event(rtmr=one.pcr, type=0, digest=one.digest, data=b"") for one in extends]


def assert_agrees(prediction: Prediction, events: list[Event]) -> None:
    found = compare(prediction, events)
    rows = [row.facts("pcr") for row in found.rows if row.verdict != "same"]
    assert not rows, rows
    assert len(found.rows) == len(prediction.events)


def test_the_products_image_boots_as_computed(guest_directory: Path) -> None:
    """From its disk alone, until the kernel has taken over."""
    image = build_product([built_package()])
    prediction = prediction_of(image.facts)
    with measured_boot(guest_directory / "measured-product", image.disk) as boot:
        boot.wait(
            lambda: LEFT in [one.digest for one in boot.extends()], timeout_s=BOOT_S
        )
        extends = boot.extends()
    assert LEFT in [one.digest for one in extends], boot.tail()
    assert_agrees(prediction, as_events(extends))
    # What a TD's RTMR1 gets of it, in the same order.
    loader = [one.digest for one in extends if one.pcr in (4, 5)]
    loader.remove(SEPARATOR)  # a TPM gets one in PCR 4 and one in PCR 5
    parts = read_boot_image(image.disk)
    td = predict(parts.uki, parts.table, MACHINES["edk2"])
    assert [one.digest for one in td.events if one.register == 1] == loader
    # And of RTMR2: this stub does not know RTMRs, and the kernel does.
    kernel = [one.digest for one in extends if one.pcr == 9]
    assert [one.digest for one in td.events if one.register == 2] == kernel


@pytest.fixture
def log_disk(guest_directory: Path) -> Path:
    """A disk with the stub of the image and the kernel of the tests, which shows its TPM's log."""
    parts = base.base_directory()
    initrd = (parts / "initrd").read_bytes()
    content = {
        ".osrel": b"ID=test\n",
        ".cmdline": COMMAND_LINE,
        ".linux": (parts / "kernel").read_bytes(),
        ".initrd": initrd + bytes(-len(initrd) % 4) + archive_of_init(),
    }
    directory = guest_directory / "measured-disk"
    directory.mkdir()
    uki, root = directory / "uki.efi", directory / "root"
    stub = (image_base("product") / STUB).read_bytes()
    uki.write_bytes(make_uki(stub, content)[0])
    root.write_bytes(bytes(4096))
    disk = directory / "disk.raw"
    make_disk(uki, root, "00" * 32, disk)
    return disk


def archive_of_init() -> bytes:
    """A second archive behind the initrd's own, whose files take the place of those there."""
    made = bytearray()
    files = [("init", stat.S_IFREG | 0o755, INIT), ("TRAILER!!!", 0, b"")]
    for number, (name, mode, content) in enumerate(files, start=1):
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        made += b"070701" + b"".join(b"%08X" % field for field in fields)
        made += name.encode() + b"\0"
        made += bytes(-len(made) % 4) + content
        made += bytes(-len(made) % 4)
    return bytes(made)


def test_the_log_and_the_registers_are_as_computed(
    guest_directory: Path, log_disk: Path
) -> None:
    """By the log that the kernel shows, with its types, and by the registers themselves."""
    prediction = prediction_of(log_disk)
    with measured_boot(guest_directory / "measured-log", log_disk) as boot:
        boot.wait(lambda: False, timeout_s=BOOT_S)  # it switches itself off
        shown = boot.serial[1].read_bytes().replace(b"\r\n", b"\n")
        console = boot.serial[0].read_text(errors="replace")
    log, end, _ = shown.partition(BEGIN)[2].partition(END)
    assert end, boot.tail()
    events = [
        Event(rtmr=one.rtmr + 1, type=one.type, digest=one.digest, data=one.data)
        for one in parse_event_log(log, last_register=LAST_PCR)
    ]
    assert_agrees(prediction, events)
    rows = compare(prediction, events).rows
    assert [row.found.type for row in rows if row.found] == [
        one.type for pcr in VIRTUAL_TPM.predicted for one in of(prediction, pcr)
    ]
    for pcr in (4, 5, 9, 11, 12):
        value = prediction.value(pcr)
        assert value is not None
        assert f"PCR {pcr} {value.hex().upper()}" in console


def of(prediction: Prediction, register: int) -> list[ExpectedEvent]:
    return [one for one in prediction.events if one.register == register]
