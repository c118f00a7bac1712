"""Event logs replay to the registers that the CPU reports, or are refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core.eventlog import (
    EV_NO_ACTION,
    MAX_EVENTS,
    MAX_LOG_BYTES,
    Event,
    encode_event_log,
    parse_event_log,
    replay,
)
from tdxd.core.quote import parse_quote
from tdxd.errors import EvidenceMalformedError
from tests.vectors import VECTORS, needs_vectors, quote_bytes

QUOTES = VECTORS / "quotes"
FULL = sorted(QUOTES.glob("*/ccel.bin")) if QUOTES.is_dir() else []
PARTIAL = sorted(QUOTES.glob("*/ccel-partial-*.bin")) if QUOTES.is_dir() else []
INDEX = VECTORS / "event_logs" / "index.json"
LOGS = json.loads(INDEX.read_text()) if INDEX.is_file() else []


def event(rtmr: int = 0, *, kind: int = 0xD, data: bytes = b"data") -> Event:
    digest = hashlib.sha384(data).digest()
    return Event(rtmr=rtmr, type=kind, digest=digest, data=data)


EVENTS = (event(0), event(1, data=b""), event(3, data=bytes(300)), event(-1))
LOG = encode_event_log(EVENTS)
SPEC_ID_BYTES = len(encode_event_log(()))


@needs_vectors
@pytest.mark.parametrize("path", FULL, ids=lambda path: path.parent.name)
def test_real_logs_replay_to_their_quotes(path) -> None:
    quote = parse_quote(quote_bytes(path.parent.name))
    assert replay(parse_event_log(path.read_bytes())) == quote.rtmrs


@needs_vectors
@pytest.mark.parametrize("path", PARTIAL, ids=lambda path: path.parent.name)
def test_logs_of_another_boot_do_not_match(path) -> None:
    quote = parse_quote(quote_bytes(path.parent.name))
    assert replay(parse_event_log(path.read_bytes())) != quote.rtmrs


@needs_vectors
@pytest.mark.parametrize("log", LOGS, ids=lambda log: log["file"])
def test_real_logs_alone_replay_as_recorded(log) -> None:
    data = (VECTORS / "event_logs" / log["file"]).read_bytes()
    events = parse_event_log(data)
    rtmrs = replay(events)
    assert len(events) == log["events"]
    for name, value in log["replay"].items():
        assert rtmrs[int(name.removeprefix("rtmr"))].hex() == value


@needs_vectors
def test_there_are_real_logs() -> None:
    assert len(FULL) >= 2
    assert len(PARTIAL) >= 3
    assert len(LOGS) >= 6


def test_what_is_written_is_read() -> None:
    assert parse_event_log(LOG) == EVENTS


def test_replay_extends_from_zero_in_order() -> None:
    first, second = event(2, data=b"a"), event(2, data=b"b")
    once = hashlib.sha384(bytes(48) + first.digest).digest()
    twice = hashlib.sha384(once + second.digest).digest()
    assert replay([first, second]) == (bytes(48), bytes(48), twice, bytes(48))


def test_no_action_and_mrtd_events_extend_nothing() -> None:
    events = [event(1, kind=EV_NO_ACTION), event(-1)]
    assert replay(events) == (bytes(48),) * 4


def test_an_empty_log_has_no_events() -> None:
    assert parse_event_log(b"") == ()


@pytest.mark.parametrize("fill", [b"\0", b"\xff"])
def test_uniform_padding_ends_the_log(fill: bytes) -> None:
    assert parse_event_log(LOG + fill * 1000) == EVENTS


@pytest.mark.parametrize("tail", [b"\xff" * 64 + b"\0", bytes(64) + b"\xff", b"\x01"])
def test_anything_else_after_the_last_event_is_refused(tail: bytes) -> None:
    with pytest.raises(EvidenceMalformedError):
        parse_event_log(LOG + tail)


def test_cut_inside_an_event_is_refused() -> None:
    events = EVENTS[:3]  # of RTMRs: an MRTD event begins with zeros, as padding does
    log = encode_event_log(events)
    ends = {len(encode_event_log(events[:count])) for count in range(4)} | {0}
    for size in set(range(len(log))) - ends:
        with pytest.raises(EvidenceMalformedError):
            parse_event_log(log[:size])


def patched(offset: int, value: bytes) -> bytes:
    log = bytearray(LOG)
    log[offset : offset + len(value)] = value
    return bytes(log)


FIRST = SPEC_ID_BYTES


@pytest.mark.parametrize(
    ("offset", "value", "text"),
    [
        (0, b"\x02", "does not start with a Spec ID event"),
        (4, b"\x04", "does not start with a Spec ID event"),
        (32, b"X", "signature"),
        (56, b"\x00", "declares 0 digest algorithms"),
        (56, b"\x05", "declares 5 digest algorithms"),
        (60, b"\x0b", "declares algorithm 0x000b with 48 bytes"),
        (62, b"\x2f", "declares algorithm 0x000c with 47 bytes"),
        (28, b"\x22", "1 bytes too many"),
        (FIRST, b"\x05", "MR index 5, more than 4"),
        (FIRST + 8, b"\x02", "has 2 digests, not 1"),
        (FIRST + 12, b"\x0b", "algorithm 0x000b"),
        (FIRST + 62, b"\xff\xff\xff\xff", "needs 4294967295 bytes"),
    ],
)
def test_each_wrong_field_is_named(offset: int, value: bytes, text: str) -> None:
    with pytest.raises(EvidenceMalformedError, match=text):
        parse_event_log(patched(offset, value))


def spec_id(algorithms: list[tuple[int, int]]) -> bytes:
    body = b"Spec ID Event03\0" + struct.pack("<I4BI", 0, 0, 2, 0, 2, len(algorithms))
    body += b"".join(struct.pack("<HH", *one) for one in algorithms) + b"\0"
    return struct.pack("<II20sI", 1, EV_NO_ACTION, b"", len(body)) + body


def test_a_log_without_sha384_is_refused() -> None:
    with pytest.raises(EvidenceMalformedError, match="no SHA-384"):
        parse_event_log(spec_id([(0x000B, 32)]))


def test_an_algorithm_declared_twice_is_refused() -> None:
    with pytest.raises(EvidenceMalformedError, match="0x000c"):
        parse_event_log(spec_id([(0x000C, 48), (0x000C, 48)]))


def test_of_two_algorithms_sha384_is_taken() -> None:
    log = spec_id([(0x000B, 32), (0x000C, 48)]) + struct.pack("<III", 1, 0xD, 2)
    log += struct.pack("<H", 0x000C) + b"s" * 48 + struct.pack("<H", 0x000B)
    log += b"t" * 32 + struct.pack("<I", 0)
    assert [one.digest for one in parse_event_log(log)] == [b"s" * 48]


def test_a_digest_given_twice_is_refused() -> None:
    log = spec_id([(0x000B, 32), (0x000C, 48)]) + struct.pack("<III", 1, 0xD, 2)
    log += (struct.pack("<H", 0x000C) + b"s" * 48) * 2 + struct.pack("<I", 0)
    with pytest.raises(EvidenceMalformedError, match="repeated algorithm"):
        parse_event_log(log)


def test_too_large_a_log_is_refused() -> None:
    parse_event_log(LOG.ljust(MAX_LOG_BYTES, b"\xff"))
    with pytest.raises(EvidenceMalformedError, match="more than 1048576"):
        parse_event_log(LOG.ljust(MAX_LOG_BYTES + 1, b"\xff"))


def test_too_many_events_are_refused() -> None:
    one = event(data=b"")
    assert len(parse_event_log(encode_event_log([one] * MAX_EVENTS))) == MAX_EVENTS
    with pytest.raises(EvidenceMalformedError, match="more than 4096 events"):
        parse_event_log(encode_event_log([one] * (MAX_EVENTS + 1)))


@given(st.binary(max_size=400))
def test_any_bytes_after_the_header_give_events_or_the_error(tail: bytes) -> None:
    with contextlib.suppress(EvidenceMalformedError):
        parse_event_log(LOG[:SPEC_ID_BYTES] + tail)


@given(
    st.lists(
        st.builds(
            Event,
            rtmr=st.integers(-1, 3),
            type=st.integers(0, 2**32 - 1),
            digest=st.binary(min_size=48, max_size=48),
            data=st.binary(max_size=64),
        ),
        max_size=8,
    )
)
def test_writing_and_reading_are_inverse(events: list[Event]) -> None:
    assert parse_event_log(encode_event_log(events)) == tuple(events)


@given(st.integers(0, len(LOG) - 1), st.integers(1, 255))
def test_any_changed_byte_gives_events_or_the_error(offset: int, change: int) -> None:
    log = bytearray(LOG)
    log[offset] ^= change
    with contextlib.suppress(EvidenceMalformedError):
        parse_event_log(bytes(log))
