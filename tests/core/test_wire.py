"""Control frames: split anywhere, capped, strict."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core import wire
from tdxd.errors import DeniedError, RemoteProtocolError

MESSAGE = wire.request("status", {"a": 1})


@given(st.lists(st.integers(1, 20), max_size=30))
def test_frames_survive_any_split(cuts: list[int]) -> None:
    stream = wire.encode_frame(MESSAGE) * 3
    reader, got = wire.FrameReader(), []
    for cut in cuts:
        got += reader.feed(stream[:cut])
        stream = stream[cut:]
    got += reader.feed(stream)
    assert got == [MESSAGE] * 3
    assert not reader.half_read


@given(st.binary(max_size=200))
def test_any_bytes_give_messages_or_a_protocol_error(data: bytes) -> None:
    try:
        messages = wire.FrameReader().feed(data)
    except RemoteProtocolError:
        return
    assert all(message["v"] == wire.VERSION for message in messages)


def test_too_long_a_frame_is_refused_by_its_length_alone() -> None:
    with pytest.raises(RemoteProtocolError, match="at most 1048576"):
        wire.FrameReader().feed((wire.MAX_FRAME_BYTES + 1).to_bytes(4, "big"))


def test_too_long_a_message_is_not_sent() -> None:
    with pytest.raises(RemoteProtocolError, match="at most 1048576"):
        wire.encode_frame({"x": b"0" * wire.MAX_FRAME_BYTES})


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"\xc1", "not valid msgpack"),
        (b"", "not valid msgpack"),
        (msgpack.packb([1]), "not a msgpack map"),
        (msgpack.packb({"v": 2}), "version 2"),
        (msgpack.packb({1: 2}), "not valid msgpack"),
        (b"\x91" * 2000, "not valid msgpack"),
    ],
)
def test_bad_bodies(body: bytes, text: str) -> None:
    with pytest.raises(RemoteProtocolError, match=text):
        wire.FrameReader().feed(len(body).to_bytes(4, "big") + body)


def test_half_a_frame_is_told() -> None:
    reader = wire.FrameReader()
    assert reader.feed(b"\0\0\0") == []
    assert reader.half_read


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"v": 1, "id": 1, "verb": "explode", "args": {}}, "unknown command 'explode'"),
        ({"v": 1, "id": 1, "verb": 3, "args": {}}, "unknown command"),
        ({"v": 1, "id": "x", "verb": "status", "args": {}}, "without a number"),
        ({"v": 1, "id": 1, "verb": "status"}, "without a number or arguments"),
    ],
)
def test_bad_requests(message: dict[str, object], text: str) -> None:
    with pytest.raises(RemoteProtocolError, match=text):
        wire.parse_request(message)


def test_a_request_comes_back() -> None:
    assert wire.parse_request(wire.request("mount", {"volume": "m"}, request_id=7)) == (
        7,
        "mount",
        {"volume": "m"},
    )


def test_an_error_keeps_its_text_and_exit_code() -> None:
    frame = wire.error_reply(1, DeniedError("no", hint="ask"))
    with pytest.raises(wire.RemoteError) as caught:
        wire.raise_error(frame["error"])
    assert (caught.value.message, caught.value.hint, caught.value.exit_code) == (
        "no",
        "ask",
        77,
    )
    assert caught.value.remote_code == "key-denied"


def test_an_error_without_fields_is_still_an_error() -> None:
    with pytest.raises(wire.RemoteError, match="without a text") as caught:
        wire.raise_error(None)
    assert caught.value.exit_code == 70


def test_looking_is_for_all_and_changing_for_root() -> None:
    looking = {verb for verb, changes in wire.VERBS.items() if not changes}
    assert looking == {"status", "events", "wait", "health", "version"}
