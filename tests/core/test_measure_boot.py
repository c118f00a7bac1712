"""What a boot of an image is expected to measure, and how a log is held against that."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core.event_meaning import (
    EV_EFI_ACTION,
    EV_EFI_VARIABLE_BOOT,
    EV_EVENT_TAG,
    EV_IPL,
    EV_SEPARATOR,
)
from tdxd.core.eventlog import Event, parse_event_log, replay
from tdxd.core.measure.boot import BOOT_APPLICATION, predict
from tdxd.core.measure.compare import MAX_COMPARED, compare
from tdxd.core.measure.gpt import parse_gpt
from tdxd.core.measure.machines import MACHINES, VIRTUAL_TPM, machine
from tdxd.core.measure.uki import parse_uki
from tdxd.errors import DataError, UsageError
from tests.boot_log import event, sha384, variable_data
from tests.measured_parts import ESP, make_gpt, make_kernel, make_pe, make_uki
from tests.vectors import VECTORS, needs_vectors

TABLE = parse_gpt(make_gpt([(ESP, 2048, 4095)]))
GOOGLE_UKI = "event_logs/295d89f9-CCEL_data_grub_gke.bin"
"""A boot of a UKI on Google's TDX machines, its stub of systemd 256 or later."""
NEW: dict[str, Any] = {"version": "256.4", "cc": True}


def prediction(kind="edk2", table=TABLE, **parts):
    return predict(parse_uki(make_uki(**parts)), table, MACHINES[kind])


def boot_of(expected):
    """The log of a boot as it was predicted."""
    return [
        Event(rtmr=one.register, type=one.type, digest=one.digest, data=b"data")
        for one in expected.events
        if one.digest is not None
    ]


def types(expected, register):
    return [one.type for one in expected.events if one.register == register]


# --- the UKI ----------------------------------------------------------------------


def test_what_each_program_measures_is_found_in_it():
    old = parse_uki(make_uki())
    assert (old.version, old.version_text) == (252, "252.39-1")
    assert not old.stub_to_rtmr
    assert not old.kernel_to_rtmr
    new = parse_uki(make_uki(**NEW, kernel=make_kernel(cc=True)))
    assert new.stub_to_rtmr
    assert new.kernel_to_rtmr
    none = parse_uki(make_uki(kernel=make_kernel(tags=False)))
    assert not none.kernel_measures_options
    assert not none.kernel_measures_initrd
    assert parse_uki(make_uki(version="255 \x1b]0;x\x07")).version_text.isprintable()
    silent = prediction(kernel=make_kernel(cc=True, tags=False))
    assert silent.value(2) == bytes(48)
    assert len(silent.remarks) == 2


@pytest.mark.parametrize(
    ("version", "sections"),
    [
        ("252", ".linux .osrel .cmdline .initrd .pcrpkey"),
        ("254", ".linux .osrel .cmdline .initrd .uname .sbat .pcrpkey"),
        ("256", ".linux .osrel .cmdline .initrd .ucode .uname .sbat .pcrpkey"),
        ("257", ".linux .osrel .cmdline .initrd .ucode .uname .sbat .pcrpkey .profile"),
    ],
)
def test_sections_are_measured_in_systemds_order(version, sections):
    more = ("profile", "pcrsig", "pcrpkey", "sbat", "uname", "ucode")
    parts: dict[str, Any] = dict.fromkeys(more, b"x")
    made = make_uki(version=version, **parts)
    assert " ".join(parse_uki(made).measured_sections) == sections


@pytest.mark.parametrize(
    ("line", "options"),
    [
        (b"quiet", "quiet\0"),
        (b"quiet\0more", "quiet\0"),
        (b"quiet ", None),  # versions differ in what they cut off
        (b"a\nb", None),
        (b"\xff", None),
        (b"", None),
    ],
)
def test_the_command_line_that_the_kernel_gets(line, options):
    found = parse_uki(make_uki(command_line=line)).load_options()
    assert found == (options and options.encode("utf-16-le"))


def test_an_initrd_to_which_the_stub_adds_is_not_known():
    assert parse_uki(make_uki()).initrd() == b"070701" * 100
    assert parse_uki(make_uki(pcrsig=b"x")).initrd() is None
    assert parse_uki(make_uki(version="256")).initrd() is None


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (make_pe({".text": b"x"}), "no unified kernel image"),
        (make_pe({".linux": b"x"}), "no unified kernel image"),
        (make_uki(version="251"), "older than 252"),
        (
            make_uki(initrd=b"x").replace(b".osrel\0\0", b".linux\0\0"),
            "2 sections .linux",
        ),
        (b"MZ", "needs 4 bytes"),
    ],
)
def test_what_is_no_uki(data, text):
    with pytest.raises(DataError, match=text):
        parse_uki(data)


def test_a_kernel_that_is_no_program():
    with pytest.raises(DataError, match=r"section \.linux is no PE image"):
        prediction(kernel=b"not a kernel, but long enough to be read")


# --- the prediction -----------------------------------------------------------------


def test_a_boot_by_an_old_stub_and_a_new_kernel():
    """What the product's image does: RTMR2 is the kernel's."""
    found = prediction(kernel=make_kernel(cc=True))
    assert types(found, 1) == [
        EV_EFI_ACTION,
        EV_SEPARATOR,
        0x80000006,
        BOOT_APPLICATION,
        BOOT_APPLICATION,
        EV_EFI_ACTION,
        EV_EFI_ACTION,
    ]
    line = sha384("quiet root=verity\0".encode("utf-16-le"))
    initrd = sha384(b"070701" * 100)
    assert [one.digest for one in found.events if one.register == 2] == [line, initrd]
    assert found.remarks == ()
    registers = replay(boot_of(found))
    assert (found.value(1), found.value(2)) == registers[1:3]


def test_a_boot_that_no_program_measures_says_what_is_open():
    found = prediction()
    assert found.value(2) == bytes(48)
    assert len(found.remarks) == 2
    assert "is in no register" in found.remarks[0]


def test_a_stub_that_measures_to_rtmr2():
    found = prediction(**NEW)
    assert types(found, 2) == [EV_IPL] * 8
    contents = [one.digest for one in found.events if one.register == 2]
    assert contents[:2] == [sha384(b".linux\0"), sha384(make_kernel())]
    assert found.remarks == (found.remarks[0],)


def test_a_stub_that_is_not_known_yet():
    found = prediction(version="300", cc=True)
    assert found.value(2) is None
    assert "newer" in found.unknown(2)[0].why
    assert found.value(1) is None
    assert "without firmware" in found.unknown(1)[0].why
    assert compare(found, boot_of(found)).agrees


def test_a_kernel_that_firmware_may_not_load_is_this_one_or_none():
    """From 258 on the stub may start it: that is no reason to take another program there."""
    found = prediction(version="300", cc=True)
    log = boot_of(found)
    kernel = [n for n, one in enumerate(log) if one.type == BOOT_APPLICATION][1]
    without = [*log[:kernel], *log[kernel + 1 :]]
    assert compare(found, without).agrees
    evil = dataclasses.replace(log[kernel], digest=sha384(b"evil"))
    for more in ([evil], [log[kernel], evil], [evil, log[kernel]], [log[kernel]] * 2):
        (row,) = compare(found, [*log[:kernel], *more, *log[kernel + 1 :]]).differences
        assert row.verdict == "extra"
        assert "a program" in row.note
    assert found.value(1) is None


def test_a_new_stub_hides_the_initrd_from_the_computation():
    found = prediction(**NEW, kernel=make_kernel(cc=True))
    assert found.value(1) is not None
    assert found.value(2) is None
    assert "archives" in found.unknown(2)[0].why


def test_without_the_disk_rtmr1_is_not_known():
    found = prediction(table=None)
    assert found.value(1) is None
    assert "only the UKI" in found.unknown(1)[0].why


def test_machines_differ_in_separator_and_boot_variables():
    assert EV_SEPARATOR not in types(prediction("edk2-old"), 1)
    assert prediction("google").value(1) == prediction("edk2").value(1)
    alibaba = prediction("alibaba")
    assert types(alibaba, 1)[0] == EV_EFI_VARIABLE_BOOT
    assert alibaba.value(1) is None
    with pytest.raises(UsageError, match="'ibm' is not known"):
        machine("ibm")


def test_every_part_of_the_image_is_in_a_register():
    plain = {"kernel": make_kernel(cc=True)}
    before = prediction(**plain)
    for changed in (
        {**plain, "command_line": b"quiet root=other"},
        {**plain, "uname": b"6.12"},
        {"kernel": make_kernel(cc=True) + bytes(1)},
    ):
        assert prediction(**changed).value(1) != before.value(1)
    other = parse_gpt(make_gpt([(ESP, 2048, 4096)]))
    assert prediction(table=other, **plain).value(1) != before.value(1)


# --- comparing ----------------------------------------------------------------------


def verdicts(found):
    return [row.verdict for row in found.rows if row.verdict != "same"]


def test_a_boot_as_predicted_agrees():
    expected = prediction(**NEW)
    found = compare(expected, boot_of(expected))
    assert found.agrees
    assert len(found.rows) == len(expected.events)
    assert all(
        row.facts("rtmr")["register"] in ("rtmr1", "rtmr2") for row in found.rows
    )


def test_each_departure_is_named_alone():
    expected = prediction(**NEW)
    log = boot_of(expected)
    (place,) = [n for n, one in enumerate(log) if one.type == BOOT_APPLICATION][:1]
    changed = dataclasses.replace(log[place], digest=sha384(b"evil"))
    (row,) = compare(expected, [*log[:place], changed, *log[place + 1 :]]).differences
    assert (row.verdict, row.index) == ("differs", place)
    assert "BOOTX64.EFI" in str(row.facts("rtmr")["meaning"])
    (row,) = compare(expected, [*log[:place], *log[place + 1 :]]).differences
    assert (row.verdict, row.index) == ("missing", None)
    assert row.facts("rtmr")["type"] == "EV_EFI_BOOT_SERVICES_APPLICATION"
    more = event(1, EV_EFI_ACTION, b"Returning from EFI Application from Boot Option")
    (row,) = compare(expected, [*log[:1], more, *log[1:]]).differences
    assert (row.verdict, row.index) == ("extra", 1)
    assert "boot option" in row.note


def test_a_separator_elsewhere_hints_at_the_machine():
    log = boot_of(prediction("edk2-old"))
    (row,) = compare(prediction("edk2"), log).differences
    assert (row.verdict, "edk2-old" in row.note) == ("missing", True)


def boot_variable(value, measured=None):
    data = variable_data("PK", value)
    return event(1, EV_EFI_VARIABLE_BOOT, data, value if measured is None else measured)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_boot_variables_are_taken_where_they_may_be(count):
    expected = prediction("alibaba")
    log = [*(boot_variable(b"%d" % n) for n in range(count)), *boot_of(expected)]
    found = compare(expected, log)
    assert found.agrees
    assert verdicts(found) == ["taken"] * count
    assert not compare(prediction("edk2"), log).differences or count


def test_boot_variables_whose_digest_is_another_are_not_taken():
    expected = prediction("alibaba")
    log = [boot_variable(b"x", b"a driver"), *boot_of(expected)]
    assert verdicts(compare(expected, log)) == ["extra"]


def test_an_event_that_cannot_be_computed_is_taken_once():
    expected = prediction(kernel=make_kernel(cc=True), command_line=b"x ")
    options = event(2, EV_EVENT_TAG, b"LOADED_IMAGE::LoadOptions", b"what it was")
    log = boot_of(expected)
    whole = [*log[:-1], options, log[-1]]
    assert verdicts(compare(expected, whole)) == ["taken"]
    assert verdicts(compare(expected, [*whole[:-1], options, log[-1]])) == [
        "taken",
        "extra",
    ]


def test_very_many_events_are_all_extra():
    expected = prediction()
    log = [event(2, EV_IPL, b"%d" % n) for n in range(MAX_COMPARED + 10)]
    found = compare(expected, [*boot_of(expected), *log])
    assert verdicts(found) == ["extra"] * len(log)


@given(st.lists(st.integers(0, 9), max_size=12))
def test_the_alignment_loses_no_event(places):
    expected = prediction(**NEW)
    pool = [*boot_of(expected)[:6], *(event(1, n, b"x") for n in range(5, 9))]
    log = [pool[place] for place in places]
    rows = compare(expected, log).rows
    assert sorted(row.index for row in rows if row.index is not None) == [
        *range(len(log))
    ]
    wanted = [row.expected for row in rows if row.expected is not None]
    assert wanted == [one for one in expected.events if one.register == 1] + [
        one for one in expected.events if one.register == 2
    ]


# --- real logs ------------------------------------------------------------------------


@needs_vectors
def test_a_real_boot_of_a_uki_has_these_events_in_this_order():
    """Google's log of another UKI: all that does not depend on the UKI has the same digest."""
    log = parse_event_log((VECTORS / GOOGLE_UKI).read_bytes())
    expected = prediction("google", **NEW, uname=b"6.6", sbat=b"sbat")
    rows = compare(expected, log).rows
    assert {row.verdict for row in rows} == {"same", "differs"}
    pairs = [(row.expected, row.found) for row in rows if row.expected and row.found]
    assert len(pairs) == len(rows)
    assert all(expected.type == found.type for expected, found in pairs)
    fixed = [row for row in rows if row.verdict == "same"]
    assert len(fixed) == 4 + 6, "actions and the separator; six names of sections"
    assert len(rows) == 10 + 3 + 6, "disk, UKI, kernel; six contents of sections"


def fixed_events(name):
    """The digests of what no image decides, as far as they are in a real log's RTMR1."""
    log = parse_event_log((VECTORS / name).read_bytes())
    wanted = {
        one.digest: one.meaning
        for one in prediction("google").events
        if one.type in (EV_EFI_ACTION, EV_SEPARATOR)
    }
    return [wanted[one.digest] for one in log if one.rtmr == 1 and one.digest in wanted]


@needs_vectors
@pytest.mark.parametrize(
    ("name", "separator"),
    [
        (GOOGLE_UKI, True),
        ("event_logs/5ad54ed0-CCEL_data_gcp.bin", True),
        ("event_logs/562ce779-CCEL_AAEL_alibabacloud.bin", True),
        ("event_logs/17204d16-CCEL_data_grub.bin", False),
        ("event_logs/ce55234a-CCEL_data_ovmf.bin", False),
    ],
)
def test_real_firmware_extends_these_actions(name, separator):
    found = fixed_events(name)
    assert len(found) == 3 + separator
    assert any("end of what firmware" in one for one in found) == separator


@needs_vectors
def test_alibabas_boot_variables_are_taken():
    """Its grub boot differs; the variables before it are where the machine says."""
    path = VECTORS / "event_logs/562ce779-CCEL_AAEL_alibabacloud.bin"
    rows = compare(prediction("alibaba"), parse_event_log(path.read_bytes())).rows
    taken = [row for row in rows if row.verdict == "taken"]
    assert [row.index for row in taken] == [*range(12, 19)]


@needs_vectors
def test_the_partition_tables_of_real_logs_are_measured_whole():
    count = 0
    for path in sorted(VECTORS.glob("event_logs/*.bin")):
        for one in parse_event_log(path.read_bytes()):
            if one.type == 0x80000006:
                count += 1
                assert hashlib.sha384(one.data).digest() == one.digest
                size = int.from_bytes(one.data[92:100], "little")
                assert len(one.data) == 100 + 128 * size
    assert count == 4


def test_the_tpm_of_the_tests_gets_the_same_in_other_registers():
    uki = parse_uki(make_uki())
    found = predict(uki, TABLE, VIRTUAL_TPM)
    assert {one.register for one in found.events} == {2, 3, 4, 5, 6, 9, 11}
    assert found.value(12) == bytes(48)
