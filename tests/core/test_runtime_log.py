"""The runtime log has one form, and its events are proved by the replay."""

from __future__ import annotations

import contextlib
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core.bundle import Manifest
from tdxd.core.decode import encode_canonical
from tdxd.core.runtime_log import (
    MAX_RUNTIME_EVENTS,
    MAX_RUNTIME_LOG_BYTES,
    VOLUME_EVENT,
    RuntimeEvent,
    VolumeServed,
    encode_runtime_log,
    parse_runtime_log,
    read_volume_event,
    replay_runtime,
    volume_event,
)
from tdxd.errors import EvidenceMalformedError
from tests.vectors import VECTORS, expected, needs_vectors

MANIFEST = Manifest(
    volume_id="resnet",
    generation=3,
    payload_offset_bytes=16 << 20,
    data_blocks=100,
    hash_blocks=2,
    root_hash=bytes(32),
    salt=b"s" * 32,
)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,12}", fullmatch=True)
EVENTS = st.builds(RuntimeEvent, name=NAMES, payload=st.binary(max_size=40))


def dstack_events(name: str) -> list[dict[str, str]]:
    path = VECTORS / "quotes" / name / "events.json"
    items = json.loads(path.read_text())
    return [item for item in items if item["event_type"] == 0x08000001]


@needs_vectors
@pytest.mark.parametrize(
    "name", ["dstack-tdx-lite-getquote-1d0342", "mpc-verify_quote_args-b9e238"]
)
def test_real_runtime_events_of_dstack_replay_to_rtmr3(name: str) -> None:
    items = dstack_events(name)
    events = [
        RuntimeEvent(name=one["event"], payload=bytes.fromhex(one["event_payload"]))
        for one in items
    ]
    assert len(events) >= 9
    for event, item in zip(events, items, strict=True):
        assert item["digest"] in ("", event.digest().hex())
    assert replay_runtime(bytes(48), events).hex() == expected(name)["rt_mr3"]
    assert parse_runtime_log(encode_runtime_log(events)) == tuple(events)


def test_digest_is_that_of_dstacks_rule() -> None:
    event = RuntimeEvent(name="app-id", payload=b"\x01")
    text = b"\x01\x00\x00\x08:app-id:\x01"
    assert event.digest() == hashlib.sha384(text).digest()


def test_replay_extends_in_order() -> None:
    one, two = (RuntimeEvent(name=name, payload=b"") for name in "ab")
    first = hashlib.sha384(b"x" * 48 + one.digest()).digest()
    assert replay_runtime(b"x" * 48, ()) == b"x" * 48
    assert (
        replay_runtime(b"x" * 48, [one, two])
        == hashlib.sha384(first + two.digest()).digest()
    )


def test_no_events_are_no_bytes() -> None:
    assert encode_runtime_log(()) == b""
    assert parse_runtime_log(b"") == ()


@given(st.lists(EVENTS, max_size=6))
def test_writing_and_reading_are_inverse(events: list[RuntimeEvent]) -> None:
    assert parse_runtime_log(encode_runtime_log(events)) == tuple(events)


@given(st.binary(max_size=200))
def test_any_bytes_give_events_or_the_error(data: bytes) -> None:
    with contextlib.suppress(EvidenceMalformedError):
        assert encode_runtime_log(parse_runtime_log(data)) == data


@given(st.lists(EVENTS, min_size=1, max_size=4), st.data())
def test_any_changed_byte_gives_other_events_or_the_error(
    events: list[RuntimeEvent], data: st.DataObject
) -> None:
    log = bytearray(encode_runtime_log(events))
    log[data.draw(st.integers(0, len(log) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(EvidenceMalformedError):
        assert parse_runtime_log(bytes(log)) != tuple(events)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({}, "not a list of 1 to 4096"),
        ([], "not a list of 1 to 4096"),
        ([["a", b""]] * (MAX_RUNTIME_EVENTS + 1), "not a list of 1 to 4096"),
        ([["a"]], "0: not a name and a payload"),
        ([["a", b"", b""]], "0: not a name and a payload"),
        ([["a", "b"]], "0: not a name and a payload"),
        ([[b"a", b""]], "0: not a name and a payload"),
        ([["a", b""], {"a": b""}], "1: not a name and a payload"),
        ([["a", b""], ["", b""]], "1: runtime event name '' is not"),
        ([["/a", b""]], "name '/a' is not"),
        ([["a" * 129, b""]], "is not 1 to 128"),
    ],
)
def test_other_shapes_are_refused(value: object, text: str) -> None:
    with pytest.raises(EvidenceMalformedError, match=text):
        parse_runtime_log(encode_canonical(value))


def test_too_large_a_log_is_refused() -> None:
    log = encode_runtime_log([RuntimeEvent(name="a", payload=bytes(1 << 18))])
    with pytest.raises(EvidenceMalformedError, match=f"most {MAX_RUNTIME_LOG_BYTES}"):
        parse_runtime_log(log)


def test_volume_event_tells_id_generation_and_hash_of_the_manifest() -> None:
    event = volume_event(MANIFEST)
    assert event.name == VOLUME_EVENT
    assert read_volume_event(event) == VolumeServed(
        volume_id="resnet", generation=3, manifest_sha256=MANIFEST.digest()
    )
    assert MANIFEST.salt not in event.payload


def test_event_of_another_name_is_no_volume() -> None:
    assert read_volume_event(RuntimeEvent(name="app-id", payload=b"")) is None


GOOD: dict[str, object] = {
    "volume_id": "resnet",
    "generation": 3,
    "manifest_sha256": b"m" * 32,
}


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"volume_id": "../x"}, "volume id '../x'"),
        ({"generation": 0}, "generation 0 is not"),
        ({"generation": 2**63}, "generation 9223372036854775808 is not"),
        ({"manifest_sha256": b"m"}, "is 1 bytes, not 32"),
        ({"manifest_sha256": "m" * 32}, "manifest_sha256: expected bytes"),
        ({"more": 1}, "more: unknown key"),
    ],
)
def test_volume_event_of_another_payload_is_refused(
    changed: dict[str, object], text: str
) -> None:
    payload = encode_canonical(GOOD | changed)
    with pytest.raises(EvidenceMalformedError, match=text):
        read_volume_event(RuntimeEvent(name=VOLUME_EVENT, payload=payload))


def test_volume_event_is_read_in_one_form_only() -> None:
    payload = encode_canonical(GOOD)
    assert payload.count(b"\x03") == 1
    longer = payload.replace(b"\x03", b"\xcc\x03")
    with pytest.raises(EvidenceMalformedError, match="not canonical"):
        read_volume_event(RuntimeEvent(name=VOLUME_EVENT, payload=longer))
    with pytest.raises(EvidenceMalformedError, match="at most 256"):
        read_volume_event(RuntimeEvent(name=VOLUME_EVENT, payload=bytes(257)))


def test_a_key_that_a_terminal_would_obey_is_shown_escaped():
    payload = encode_canonical({"\x1b[2J": 1})
    with pytest.raises(EvidenceMalformedError) as caught:
        read_volume_event(RuntimeEvent(name=VOLUME_EVENT, payload=payload))
    assert "\x1b" not in caught.value.message
