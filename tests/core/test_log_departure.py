"""A log that is not the enrolled one is told by its first other event."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core.event_meaning import EV_IPL
from tdxd.core.eventlog import EV_NO_ACTION, Event, parse_event_log
from tdxd.core.log_departure import (
    Departure,
    ReferenceLog,
    first_departure,
    reference_log,
)
from tests.boot_log import BOOT, event, file, grub, separator
from tests.vectors import VECTORS, needs_vectors

REFERENCE = reference_log("image", BOOT)
COS = VECTORS / "quotes" / "go-tdx-guest-cos-113-tdx-quote-00b252"
LIVE = VECTORS / "quotes" / "attestation-rs-tdx_quote_live-3ab56d"


def departure(*events: Event) -> Departure:
    found = first_departure(REFERENCE, events)
    assert found is not None
    return found


def test_the_same_log_departs_nowhere() -> None:
    assert first_departure(REFERENCE, BOOT) is None
    quiet = Event(rtmr=0, type=EV_NO_ACTION, digest=bytes(48), data=b"")
    assert first_departure(REFERENCE, (quiet, *BOOT)) is None


def test_the_reference_says_what_stood_there() -> None:
    assert REFERENCE.rtmr0[1] == (
        f"{BOOT[1].digest.hex()[:16]} EV_EFI_VARIABLE_DRIVER_CONFIG SecureBoot 01"
    )
    assert [len(lines) for lines in REFERENCE.registers] == [5, 4, 4, 0]


def test_another_event() -> None:
    bad = grub("linux /vmlinuz init=/bin/sh")
    found = departure(*BOOT[:8], bad, *BOOT[9:])
    assert (found.register, found.position, found.index) == (2, 0, 8)
    assert found.expected.endswith("EV_IPL linux /vmlinuz root=/dev/vda1 ro")
    assert found.actual.startswith("rtmr2, event 1 of 4: another: log entry 8: ")
    assert found.actual.endswith("EV_IPL linux /vmlinuz init=/bin/sh")


def test_an_added_event() -> None:
    found = departure(*BOOT[:4], separator(0), *BOOT[4:])
    assert "rtmr0, event 5 of 5: added: log entry 4" in found.actual


def test_an_event_added_at_the_end() -> None:
    found = departure(*BOOT, file("/more", b"x"))
    assert found.expected == "rtmr2, event 5 of 4: no further event"
    assert "added: log entry 13" in found.actual


def test_a_removed_event() -> None:
    found = departure(*BOOT[:9], *BOOT[10:])
    assert "rtmr2, event 2 of 4: the expected one is missing" in found.actual
    assert '"/vmlinuz"' in found.expected


def test_an_event_removed_from_the_end() -> None:
    found = departure(*BOOT[:-1])
    assert found.index is None
    assert found.actual == "rtmr1, event 4 of 4: missing: the log has 3"
    assert "Exit Boot Services" in found.expected


def test_events_in_another_order() -> None:
    found = departure(*BOOT[:9], BOOT[10], BOOT[9], BOOT[11], BOOT[12])
    assert "rtmr2, event 2 of 4: in another order: log entry 9" in found.actual


def test_of_several_departures_the_first_in_the_log_is_told() -> None:
    bad = [file("/x", b"x"), event(0, EV_IPL, b"late")]
    found = departure(*BOOT[:8], *bad, *BOOT[8:])
    assert found.register == 2
    gone = departure(
        *BOOT[:8], *BOOT[9:-1]
    )  # nothing of rtmr1's end is left to point at
    assert gone.register == 2


@pytest.mark.parametrize(
    "line", ["", "0123456789abcdef", "0123456789ABCDEF EV_IPL", "0123456789abcdef \n"]
)
def test_other_lines_are_no_reference(line: str) -> None:
    with pytest.raises(ValueError, match=r"rtmr1: .* is not 16 hex digits"):
        ReferenceLog(name="x", rtmr1=(line,))


@needs_vectors
def test_the_doctored_log_of_cos_is_told_by_its_firmware_and_separator() -> None:
    """Its second separator stands in the wrong register, after a firmware of another version."""
    enrolled = reference_log("cos", parse_event_log((COS / "ccel.bin").read_bytes()))
    bad = parse_event_log((COS / "ccel-partial-d3d761.bin").read_bytes())
    found = first_departure(enrolled, bad)
    assert found is not None
    assert (found.register, found.index) == (0, 1)
    assert "another: log entry 1: 1411da909afb9068" in found.actual
    newer = (enrolled.rtmr0[0], reference_log("bad", bad).rtmr0[1], *enrolled.rtmr0[2:])
    second = first_departure(dataclasses.replace(enrolled, rtmr0=newer), bad)
    assert second is not None
    assert second.actual == (
        "rtmr0, event 15 of 16: added: log entry 15: "
        "394341b7182cd227 EV_SEPARATOR 00000000"
    )


@needs_vectors
def test_the_log_of_another_boot_is_told_by_its_initrd() -> None:
    enrolled = reference_log("live", parse_event_log((LIVE / "ccel.bin").read_bytes()))
    bad = parse_event_log((LIVE / "ccel-partial-5e9004.bin").read_bytes())
    found = first_departure(enrolled, bad)
    assert found is not None
    assert (found.register, found.index) == (2, 17)
    assert '"Linux initrd"' in found.actual


EVENTS = st.builds(
    Event,
    rtmr=st.integers(-1, 3),
    type=st.sampled_from([3, 4, 0xD, 0x80000001]),
    digest=st.sampled_from([bytes([n]) * 48 for n in range(4)]),
    data=st.binary(max_size=20),
)


def digests(reference: ReferenceLog) -> list[list[str]]:
    return [[line[:16] for line in lines] for lines in reference.registers]


@given(st.lists(EVENTS, max_size=8), st.lists(EVENTS, max_size=8))
def test_a_log_departs_exactly_where_its_replay_may(
    one: list[Event], other: list[Event]
) -> None:
    reference = reference_log("x", one)
    assert first_departure(reference, one) is None
    same = digests(reference) == digests(reference_log("x", other))
    assert (first_departure(reference, other) is None) is same
