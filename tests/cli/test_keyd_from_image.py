"""`tdx-keyd policy from-image`: from an image to a policy that a guest of it fulfils."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys

import pytest

from tdxd.cli.tdx_keyd import main
from tdxd.core.eventlog import encode_event_log, replay
from tdxd.core.log_departure import first_departure
from tdxd.core.measure.boot import predict
from tdxd.core.measure.compare import compare
from tdxd.core.measure.machines import MACHINES
from tdxd.core.policy import parse_policy
from tdxd.owner.measured.image_input import read_boot_image
from tdxd.sim.platform import SimPlatform
from tests.boot_log import event, separator, sha384, variable, variable_data
from tests.judged import NOW
from tests.measured_parts import (
    ESP,
    make_firmware,
    make_gpt,
    make_kernel,
    make_uki,
)

__all__ = ["FIRMWARE", "disk", "from_image", "keyd"]

DATA = bytes(range(64))
BOOT_VARIABLE = 0x80000002
ESP_FIRST, ESP_SECTORS = 2048, 8192
UKI = make_uki(kernel=make_kernel(cc=True))
FIRMWARE = make_firmware([(0, 4096, 0xFFFFF000, 4096, 0, 1)], body=b"\x90" * 4096)


@pytest.fixture
def keyd(capfd, monkeypatch):
    def run(*argv, code=0):
        """Return standard output and standard error."""
        monkeypatch.setattr(sys, "argv", ["tdx-keyd", *map(str, argv)])
        capfd.readouterr()
        returned = main()
        out, err = capfd.readouterr()
        assert returned == code, err
        return out, err

    return run


@pytest.fixture
def from_image(keyd):
    return lambda *argv, code=0: keyd("policy", "from-image", *argv, code=code)


@pytest.fixture(scope="module")
def platform():
    return SimPlatform.create()


def make_disk(path, uki):
    """A disk with an EFI system partition as mkfs.fat makes it."""
    tree = path.with_suffix(".d")
    (tree / "EFI/BOOT").mkdir(parents=True)
    (tree / "EFI/BOOT/BOOTX64.EFI").write_bytes(uki)
    esp = path.with_suffix(".esp")
    esp.write_bytes(bytes(ESP_SECTORS * 512))
    for command in (
        ["mkfs.fat", "-F", "12", str(esp)],
        ["mcopy", "-s", "-i", str(esp), str(tree / "EFI"), "::"],
    ):
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    table = make_gpt([(ESP, ESP_FIRST, ESP_FIRST + ESP_SECTORS - 1)])
    path.write_bytes(table.ljust(ESP_FIRST * 512, b"\0") + esp.read_bytes())
    return path


@pytest.fixture
def disk(tmp_path):
    return make_disk(tmp_path / "image.raw", UKI)


RTMR0 = [variable("SecureBoot", b"\0"), separator(0)]


def boot_log(path, kind="edk2"):
    """The events of a boot of an image as firmware of this kind logs them."""
    image = read_boot_image(path)
    expected = predict(image.uki, image.table, MACHINES[kind]).events
    return RTMR0 + [
        dataclasses.replace(event(one.register, one.type, b""), digest=one.digest)
        for one in expected
        if one.digest is not None
    ]


@pytest.fixture
def booted(platform, tmp_path):
    """Writes quote and log of a guest with these events; returns the options that name them."""

    def write(events, name="guest", **overrides):
        quote = platform.quote(DATA, rtmrs=replay(events), **overrides)
        (tmp_path / f"{name}.quote").write_bytes(quote)
        (tmp_path / f"{name}.ccel").write_bytes(encode_event_log(events))
        return (
            *("--enrolled", tmp_path / f"{name}.quote"),
            *("--event-log", tmp_path / f"{name}.ccel", "--simulated"),
        )

    return write


# --- what is computed ---------------------------------------------------------------


def test_a_fragment_says_what_is_missing_and_why(from_image, disk):
    out, err = from_image(disk, "--name", "image-2026-11")
    registers = replay(boot_log(disk))
    assert f'rtmr1 = "{registers[1].hex()}"' in out
    assert f'rtmr2 = "{registers[2].hex()}"' in out
    assert 'name = "image-2026-11"' in out
    assert "# RTMR0: enroll it." in out
    assert "# MRTD: the machine's firmware; --firmware OVMF.fd computes it" in out
    assert "not a whole policy yet" in err


def test_the_disk_the_uki_and_the_facts_are_read(from_image, disk, tmp_path):
    uki = tmp_path / "image.efi"
    uki.write_bytes(UKI)
    facts = tmp_path / "image.json"
    for part, path in (("disk", disk), ("uki", uki)):
        told = {
            part: {
                "file": path.name,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
        }
        facts.write_text(json.dumps(told))
        by_facts = json.loads(from_image(facts, "--json")[0])
        assert by_facts == json.loads(from_image(path, "--json")[0])
    assert by_facts["rtmr1"] is None
    assert by_facts["rtmr2"] is not None
    why = [one["why_unknown"] for one in by_facts["events"] if not one["digest"]]
    assert why == ["only the UKI was given, not the disk with its partition table"]
    out, _ = from_image(uki)
    assert "# rtmr1: enroll it, not computable:" in out


def test_mrtd_of_a_firmware_file(from_image, disk, tmp_path):
    firmware = tmp_path / "OVMF.fd"
    firmware.write_bytes(FIRMWARE)
    shown = json.loads(from_image(disk, "--firmware", firmware, "--json")[0])
    assert f'mrtd = ["{shown["mrtd"]}"]' in from_image(disk, "--firmware", firmware)[0]
    firmware.write_bytes(b"code alone")
    _, err = from_image(disk, "--firmware", firmware, code=65)
    assert "no OVMF firmware" in err


def test_a_machine_whose_rtmr1_holds_more(from_image, disk):
    out, _ = from_image(disk, "--machine", "alibaba")
    assert "# rtmr1: enroll it, not computable:" in out
    assert "the cloud sets the boot variables" in out
    assert "its way to build a TD are its own" in out


def test_what_an_image_leaves_unmeasured_is_a_warning(from_image, tmp_path):
    old = make_disk(tmp_path / "old.raw", make_uki())
    _, err = from_image(old)
    assert "such as credentials, is in no register" in err


# --- what is enrolled ---------------------------------------------------------------


def test_the_policy_of_a_guest_that_booted_the_image(
    keyd, from_image, disk, booted, platform, tmp_path
):
    """Computed and enrolled together let that guest pass, and no other one."""
    events = boot_log(disk)
    enrolled = booted(events)
    made = tmp_path / "policy.toml"
    from_image(disk, *enrolled, "--name", "image-2", "-o", made)
    policy = parse_policy(made.read_text())
    (image,) = policy.tdx.rtmr
    assert image.values == tuple(value.hex() for value in replay(events))
    assert "found in the quote: RTMR1, RTMR2." in made.read_text()
    (tmp_path / "collateral").write_text(platform.collateral_json(NOW))
    (tmp_path / "root").write_text(platform.root_pem)
    common = [
        *("--policy", made, "--collateral", tmp_path / "collateral"),
        *("--root", tmp_path / "root", "--at", NOW),
    ]
    keyd("appraise", *_quote(enrolled), *common)
    other = booted([*events, event(2, 0xD, b"more")], "other")
    out, _ = keyd("appraise", *_quote(other), *common, code=77)
    assert "RTMR2" in out
    _, err = from_image(disk, *enrolled, "-o", made, code=64)
    assert "exists" in err


def _quote(enrolled):
    return ("--quote", enrolled[1], "--event-log", enrolled[3])


def test_a_guest_that_booted_something_else_is_refused(
    from_image, disk, booted, tmp_path
):
    evil = make_disk(tmp_path / "evil.raw", make_uki(command_line=b"init=/bin/sh"))
    enrolled = booted(boot_log(evil))
    _, err = from_image(disk, *enrolled, code=65)
    assert "did not boot this image: rtmr1: differs: the UKI" in err
    _, err = from_image(disk, *enrolled[:2], "--simulated", code=65)
    assert "rtmr1 of the quote is" in err


def test_a_log_that_is_not_the_quotes_is_refused(from_image, disk, booted, tmp_path):
    evil = make_disk(tmp_path / "evil.raw", make_uki(command_line=b"init=/bin/sh"))
    quote, log = booted(boot_log(evil), "evil"), booted(boot_log(disk), "good")
    _, err = from_image(disk, *quote[:2], *log[2:], code=65)
    assert "rtmr1 of the quote" in err
    assert "of the same boot" in err


def test_another_firmware_than_the_guests_is_refused(
    from_image, disk, booted, tmp_path
):
    firmware = tmp_path / "OVMF.fd"
    firmware.write_bytes(FIRMWARE)
    enrolled = booted(boot_log(disk))
    _, err = from_image(disk, *enrolled, "--firmware", firmware, code=65)
    assert "its MRTD is" in err
    mrtd = json.loads(from_image(disk, "--firmware", firmware, "--json")[0])["mrtd"]
    enrolled = booted(boot_log(disk), mr_td=bytes.fromhex(mrtd))
    out, _ = from_image(disk, *enrolled, "--firmware", firmware)
    assert "found in the quote: RTMR1, RTMR2, MRTD." in out


def test_boot_variables_of_the_cloud_are_taken_from_the_log(from_image, disk, booted):
    data = variable_data("PK", b"a disk of the cloud")
    named = event(1, BOOT_VARIABLE, data, b"a disk of the cloud")
    events = boot_log(disk, "alibaba")
    events.insert(len(RTMR0), named)
    enrolled = booted(events)
    out, _ = from_image(disk, *enrolled, "--machine", "alibaba")
    assert parse_policy(out).tdx.rtmr[0].rtmr1 == replay(events)[1].hex()
    assert "# Taken from the guest's log, in RTMR1: BootOrder and Boot####" in out
    log = enrolled[3]
    out, _ = from_image(disk, "--compare", log, "--machine", "alibaba")
    assert out.startswith("AGREES, but for 1 event(s) taken as they are")
    _, err = from_image(
        disk, *enrolled[:2], "--simulated", "--machine", "alibaba", code=65
    )
    assert "--event-log" in err
    disguised = event(1, BOOT_VARIABLE, data, b"a program that ran before")
    enrolled = booted([*events[: len(RTMR0)], disguised, *events[len(RTMR0) + 1 :]])
    _, err = from_image(disk, *enrolled, "--machine", "alibaba", code=65)
    assert "rtmr1: extra" in err


def test_a_new_image_is_added_to_a_policy(from_image, disk, booted, tmp_path):
    old = tmp_path / "old.toml"
    from_image(disk, *booted(boot_log(disk)), "--name", "one", "-o", old)
    next_disk = make_disk(
        tmp_path / "next.raw", make_uki(kernel=make_kernel(cc=True), uname=b"6.13")
    )
    out, _ = from_image(next_disk, "--enrolled", old, "--name", "two")
    one, two = parse_policy(out).tdx.rtmr
    assert (one.name, two.name) == ("one", "two")
    assert (two.rtmr0, two.rtmr3) == (one.rtmr0, one.rtmr3)
    assert two.rtmr1 == replay(boot_log(next_disk))[1].hex() != one.rtmr1
    assert out.startswith(old.read_text())
    was, now = parse_policy(out).reference
    assert (now.name, now.rtmr0, now.rtmr3) == ("two", was.rtmr0, was.rtmr3)
    assert first_departure(now, boot_log(next_disk)) is None
    departure = first_departure(now, boot_log(disk))
    assert departure is not None
    assert "the UKI, EFI\\BOOT\\BOOTX64.EFI" in departure.expected
    for more, code, text in (
        (("--name", "one"), 65, "has an image 'one' already"),
        (("--name", "two", "--base", "nine"), 65, "no image 'nine'"),
        (("--name", "two", "--firmware", old), 65, "no OVMF firmware"),
        (("--name", "two", "--event-log", old), 64, "a policy has its MRTD"),
        (("--name", "two", "--machine", "alibaba"), 65, "rtmr1 cannot be computed"),
    ):
        _, err = from_image(next_disk, "--enrolled", old, *more, code=code)
        assert text in err


def test_images_of_a_policy_that_ran_on_different_machines(from_image, disk, tmp_path):
    zero, one = "00" * 48, "11" * 48
    sets = "".join(
        f'[[tdx.rtmr]]\nname = "{name}"\nrtmr0 = "{rtmr0}"\nrtmr1 = "{zero}"\n'
        f'rtmr2 = "{zero}"\nrtmr3 = "{zero}"\n'
        for name, rtmr0 in (("a", zero), ("b", one))
    )
    policy = tmp_path / "policy.toml"
    policy.write_text(
        f'[tdx]\nmrtd = ["{zero}"]\ntd_attributes = ["SEPT_VE_DISABLE"]\n'
        f'tcb_status = ["UpToDate"]\nplatforms = "any"\n{sets}'
    )
    _, err = from_image(disk, "--enrolled", policy, code=65)
    assert "--base takes one of a, b" in err
    out, _ = from_image(disk, "--enrolled", policy, "--base", "b")
    assert parse_policy(out).tdx.rtmr[2].rtmr0 == one


# --- comparing ----------------------------------------------------------------------


def test_a_log_is_compared_event_by_event(from_image, disk, tmp_path):
    log = tmp_path / "ccel"
    events = boot_log(disk)
    log.write_bytes(encode_event_log(events, size_bytes=65536))
    out, _ = from_image(disk, "--compare", log)
    assert out.startswith("AGREES")
    (place,) = [n for n, one in enumerate(events) if one.type == 6 and one.rtmr == 2][
        :1
    ]
    events[place] = dataclasses.replace(events[place], digest=sha384(b"other line"))
    log.write_bytes(encode_event_log(events))
    out, _ = from_image(disk, "--compare", log, code=77)
    assert out.startswith("DIFFERS: 1 event(s)")
    assert f"rtmr2 differs  EV_EVENT_TAG, log entry {place}" in out
    assert (
        f"expected  {sha384('quiet root=verity'.encode('utf-16-le') + bytes(2)).hex()}"
        in out
    )
    assert f"found     {sha384(b'other line').hex()}" in out
    assert "another command line or initrd" in out
    shown = json.loads(from_image(disk, "--compare", log, "--json", code=77)[0])
    image = read_boot_image(disk)
    expected = predict(image.uki, image.table, MACHINES["edk2"])
    rows = compare(expected, events).rows
    assert shown == {"agrees": False, "events": [row.facts("rtmr") for row in rows]}


def test_an_empty_log_and_a_broken_one(from_image, disk, tmp_path):
    log = tmp_path / "ccel"
    log.write_bytes(encode_event_log([]))
    assert "is empty" in from_image(disk, "--compare", log, code=65)[1]
    log.write_bytes(b"CCEL" * 20)
    assert "does not start" in from_image(disk, "--compare", log, code=65)[1]
