"""An event says only what its digest proves."""

from __future__ import annotations

import dataclasses
import struct
import uuid
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core.event_meaning import (
    EV_EFI_ACTION,
    EV_EFI_GPT_EVENT,
    EV_EFI_VARIABLE_AUTHORITY,
    EV_EFI_VARIABLE_BOOT,
    EV_EFI_VARIABLE_DRIVER_CONFIG,
    EV_EVENT_TAG,
    EV_IPL,
    EV_POST_CODE,
    EV_SEPARATOR,
    Meaning,
    describe,
    meaning_of,
    text_digests,
    type_name,
    variable_digest,
)
from tdxd.core.eventlog import Event, parse_event_log
from tests.boot_log import event, grub, load_options, sha384, variable, variable_data
from tests.vectors import VECTORS, needs_vectors

COVERAGE = {
    "EV_EFI_VARIABLE_DRIVER_CONFIG": (50, 50),
    "EV_EFI_VARIABLE_AUTHORITY": (12, 12),
    "EV_EFI_VARIABLE_BOOT": (31, 31),
    "EV_EFI_ACTION": (30, 30),
    "EV_SEPARATOR": (22, 22),
    "EV_EFI_GPT_EVENT": (7, 7),
    "EV_IPL": (146, 189),
    "EV_EVENT_TAG": (2, 10),
    "EV_POST_CODE": (0, 1),
    "EV_NO_ACTION": (0, 2),
    "EV_PLATFORM_CONFIG_FLAGS": (0, 32),
    "EV_EFI_BOOT_SERVICES_APPLICATION": (0, 22),
    "EV_EFI_PLATFORM_FIRMWARE_BLOB2": (0, 11),
    "EV_EFI_HANDOFF_TABLES2": (0, 10),
}
"""Of each type, how many events of the real logs have a meaning, and how many there are."""


def real_events() -> list[Event]:
    paths = [*VECTORS.glob("quotes/*/ccel*.bin"), *VECTORS.glob("event_logs/*.bin")]
    return [one for path in paths for one in parse_event_log(path.read_bytes())]


@needs_vectors
def test_so_many_events_of_real_logs_have_a_meaning() -> None:
    events = real_events()
    total = Counter(type_name(one.type) for one in events)
    read = Counter(type_name(one.type) for one in events if meaning_of(one))
    assert {name: (read[name], total[name]) for name in total} == COVERAGE


@needs_vectors
def test_no_changed_digest_of_a_real_log_keeps_its_meaning() -> None:
    for one in real_events():
        other = dataclasses.replace(one, digest=sha384(one.digest))
        assert meaning_of(other) is None


@needs_vectors
def test_real_logs_say_what_was_booted() -> None:
    path = VECTORS / "quotes" / "go-tdx-guest-cos-113-tdx-quote-00b252" / "ccel.bin"
    said = [meaning_of(one) for one in parse_event_log(path.read_bytes())]
    assert said[2] == Meaning(kind="variable", name="SecureBoot", value="00")
    assert said[7] == Meaning(kind="separator", value="00000000")
    command_line = said[40]
    assert command_line is not None
    assert command_line.value.startswith("/syslinux/vmlinuz.A init=/usr/lib/systemd")


def said(one: Event) -> Meaning:
    meaning = meaning_of(one)
    assert meaning is not None
    return meaning


def test_variables_with_their_names_and_values() -> None:
    secure = said(variable("SecureBoot", b"\x01"))
    assert secure == Meaning(kind="variable", name="SecureBoot", value="01")
    assert variable("dbx", b"xyz").digest == variable_digest("dbx", b"xyz")


def test_a_variable_of_another_vendor_has_another_name() -> None:
    vendor = uuid.UUID("605dab50-e046-4300-abb6-3dd810dd8b23")
    data = vendor.bytes_le + variable_data("SecureBoot", b"\x01")[16:]
    one = event(0, EV_EFI_VARIABLE_AUTHORITY, data)
    assert said(one).name == f"SecureBoot-{vendor}"


@pytest.mark.parametrize(
    "data",
    [
        variable_data("db", b"")[:31],
        variable_data("db", b"x") + b"x",
        variable_data("db", b"xy")[:-1],
        variable_data("db", b"").replace(b"d\0", b"\0\xd8"),  # half a surrogate pair
        b"\xff" * 40,
    ],
)
def test_data_that_is_no_variable(data: bytes) -> None:
    assert meaning_of(event(0, EV_EFI_VARIABLE_DRIVER_CONFIG, data)) is None


def test_a_boot_variable_proves_its_value_and_not_its_name() -> None:
    data = variable_data("PK", b"value")
    one = event(0, EV_EFI_VARIABLE_BOOT, data, b"value")
    assert said(one) == Meaning(kind="boot-variable", value=b"value".hex())
    assert meaning_of(event(0, EV_EFI_VARIABLE_BOOT, data)) is None
    assert meaning_of(event(0, EV_EFI_VARIABLE_BOOT, data[:31], b"")) is None


def test_separators_are_of_three_kinds() -> None:
    for data in (bytes(4), b"\xff" * 4, b"\1\0\0\0"):
        assert said(event(1, EV_SEPARATOR, data)).value == data.hex()
    assert meaning_of(event(1, EV_SEPARATOR, b"\2\0\0\0")) is None


@pytest.mark.parametrize("kind", [EV_EFI_ACTION, EV_POST_CODE])
def test_strings_of_the_firmware(kind: int) -> None:
    assert said(event(1, kind, b"Exit Boot Services")).value == "Exit Boot Services"
    assert meaning_of(event(1, kind, b"\xff")) is None
    assert meaning_of(event(1, kind, b"ACPI DATA", b"tables")) is None


def test_a_partition_table_names_its_disk() -> None:
    disk = uuid.UUID("c8a4efb4-1236-4873-b436-ffe48cb27efe")
    header = b"EFI PART" + bytes(48) + disk.bytes_le + bytes(20)
    assert said(event(1, EV_EFI_GPT_EVENT, header + bytes(8))).value == str(disk)
    assert meaning_of(event(1, EV_EFI_GPT_EVENT, header[:-1])) is None
    assert meaning_of(event(1, EV_EFI_GPT_EVENT, b"X" + header[1:])) is None


def test_a_tagged_event_of_an_attestation_agent() -> None:
    data = b"LEAA" + struct.pack("<I", 3) + b"abc"
    meaning = said(event(3, EV_EVENT_TAG, data))
    assert meaning == Meaning(kind="tagged", name="0x4141454c", value=b"abc".hex())
    assert meaning_of(event(3, EV_EVENT_TAG, data + b"d")) is None
    assert meaning_of(event(3, EV_EVENT_TAG, data[:7])) is None


def test_load_options_of_linux_are_not_in_the_log() -> None:
    assert meaning_of(load_options("ro")) is None


@pytest.mark.parametrize(
    "prefix",
    ["grub_cmd: ", "grub_cmd ", "kernel_cmdline: ", "grub_kernel_cmdline ", ""],
)
def test_strings_of_grub(prefix: str) -> None:
    assert said(grub("linux /vmlinuz", prefix)) == Meaning(
        kind="text", value="linux /vmlinuz"
    )
    with_nul = event(2, EV_IPL, f"{prefix}ro\0\x60".encode(), b"ro\0")
    assert said(with_nul).value == "ro"


def test_a_file_of_grub_has_none() -> None:
    assert meaning_of(event(2, EV_IPL, b"/vmlinuz\0", b"kernel")) is None
    assert meaning_of(event(2, EV_IPL, b"", b"")) is None
    assert meaning_of(event(2, EV_IPL, b"\xff\xff\xff", b"")) is None


def test_strings_of_systemd_stub() -> None:
    options = "quiet ro\0".encode("utf-16-le")
    assert said(event(2, EV_IPL, options)).value == "quiet ro"
    section = ".cmdline\0".encode("utf-16-le")
    assert said(event(2, EV_IPL, section, b".cmdline\0")).value == ".cmdline"
    assert meaning_of(event(2, EV_IPL, section, b"quiet ro")) is None


def test_what_a_boot_loader_may_have_hashed() -> None:
    forms = (b"a", b"a\0", b"a\0", b"a\0\0\0")
    assert text_digests("a") == tuple(sha384(form) for form in forms)


def test_events_are_shown_on_one_line() -> None:
    assert describe(variable("SecureBoot", b"\1")) == (
        "EV_EFI_VARIABLE_DRIVER_CONFIG SecureBoot 01"
    )
    assert describe(grub("set root=hd0")) == "EV_IPL set root=hd0"
    assert describe(event(2, 0x1234, b"\1\2", b"")) == (
        "0x00001234 2 bytes (not proved by its digest)"
    )
    path = b"\x04\x04" + "\\EFI\\BOOT".encode("utf-16-le")
    assert describe(event(1, 0x80000003, path, b"")) == (
        'EV_EFI_BOOT_SERVICES_APPLICATION "\\EFI\\BOOT" (not proved by its digest)'
    )
    assert len(describe(grub("x" * 5000))) < 100


@given(
    st.builds(
        Event,
        rtmr=st.integers(-1, 3),
        type=st.sampled_from([1, 4, 6, 0xD, 0x80000001, 0x80000002, 0x80000006, 7]),
        digest=st.binary(min_size=48, max_size=48),
        data=st.binary(max_size=100),
    )
)
def test_any_event_is_shown_in_printable_ascii_and_says_nothing_unproved(
    one: Event,
) -> None:
    assert meaning_of(one) is None
    shown = describe(one)
    assert shown.isascii()
    assert shown.isprintable()


@given(st.sampled_from([1, 4, 6, 0x80000001, 0x80000006, 0x80000007]), st.binary())
def test_any_data_under_its_own_digest_is_read_or_not(kind: int, data: bytes) -> None:
    shown = describe(event(0, kind, data))
    assert shown.isascii()
    assert shown.isprintable()
