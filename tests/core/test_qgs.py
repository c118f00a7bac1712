"""QGS frames byte by byte, and whatever a host may send instead."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core.qgs import (
    MAX_MESSAGE_BYTES,
    QgsAddress,
    encode_frame,
    error_words,
    frame_length,
    parse_qgs_address,
    parse_quote_request,
    parse_quote_response,
    port_of_attest_conf,
    quote_request,
    quote_response,
)
from tdxd.errors import (
    EvidenceError,
    EvidenceMalformedError,
    EvidenceUnavailableError,
)

REPORT = bytes(n % 251 for n in range(1024))
QUOTE = b"quote" * 1000


def response(
    *,
    major: int = 1,
    minor: int = 1,
    kind: int = 1,
    size: int | None = None,
    error: int = 0,
    sizes: tuple[int, int] = (0, len(QUOTE)),
    body: bytes = QUOTE,
) -> bytes:
    total = 24 + len(body) if size is None else size
    head = struct.pack("<HHIII", major, minor, kind, total, error)
    return head + struct.pack("<II", *sizes) + body


def test_the_request_is_intels_byte_for_byte() -> None:
    frame = encode_frame(quote_request(REPORT))
    expected = bytes.fromhex(
        "00000418"  # length, big-endian
        "0100" "0100"  # major 1, minor 1, from here on little-endian
        "00000000"  # GET_QUOTE_REQ
        "18040000"  # size
        "00000000"  # error
        "00040000" "00000000"  # a report of 1024 bytes, no list of ids
    )  # fmt: skip
    assert frame == expected + REPORT
    assert len(frame) == 1052


def test_an_old_service_is_asked_with_minor_0() -> None:
    assert quote_request(REPORT, minor=0)[:4] == bytes.fromhex("01000000")


def test_a_report_of_another_size_is_not_sent() -> None:
    for size in (0, 1023, 1025):
        with pytest.raises(ValueError, match="not 1024"):
            quote_request(bytes(size))


@pytest.mark.parametrize("minor", [0, 1, 2, 65535])
def test_a_response_is_read_whatever_its_minor_version(minor: int) -> None:
    """Intel: minor changes are compatible."""
    assert parse_quote_response(response(minor=minor)) == QUOTE


@pytest.mark.parametrize(
    "message",
    [
        quote_request(REPORT)[:12] + bytes((1, 0, 0, 0)) + quote_request(REPORT)[16:],
        struct.pack("<HHIIIII", 1, 1, 0, 24, 0, 0, 0),
        struct.pack("<HHIIIII", 1, 1, 0, 1064, 0, 1024, 16) + REPORT + bytes(16),
    ],
)
def test_a_request_for_anything_else_is_refused(message: bytes) -> None:
    with pytest.raises(EvidenceMalformedError, match="QGS request holds"):
        parse_quote_request(message)


def test_the_id_before_the_quote_is_passed_over() -> None:
    message = response(sizes=(16, len(QUOTE)), body=bytes(16) + QUOTE)
    assert parse_quote_response(message) == QUOTE


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"major": 0}, "version 0.1"),
        ({"major": 2}, "version 2.1"),
        ({"kind": 0}, "of type 0"),
        ({"kind": 3}, "of type 3"),
        ({"size": 23}, "says it is 23"),
        ({"size": 5025}, "says it is 5025 bytes long and is 5024"),
        ({"size": 0xFFFFFFFF}, "says it is 4294967295"),
        ({"sizes": (0, len(QUOTE) - 1)}, "announces 0 and 4999"),
        ({"sizes": (0, len(QUOTE) + 1)}, "announces 0 and 5001"),
        ({"sizes": (0xFFFFFFFF, len(QUOTE) + 1)}, "announces 4294967295"),
        ({"sizes": (1, len(QUOTE))}, "announces 1 and 5000"),
    ],
)
def test_a_response_that_lies_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(EvidenceMalformedError, match=words):
        parse_quote_response(response(**changed))


def test_a_header_of_the_wrong_byte_order_is_named() -> None:
    swapped = struct.pack(">HHIII", 1, 1, 1, 24 + len(QUOTE), 0)
    with pytest.raises(EvidenceMalformedError) as caught:
        parse_quote_response(swapped + response()[16:])
    assert "byte order" in caught.value.hint


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0x12001, "unexpected"),
        (0x12002, "out of memory"),
        (0x12003, "invalid"),
        (0x12004, "version of the protocol"),
        (0x12005, "type of message"),
        (0x12006, "size of the message"),
        (0x12007, "error code of the message"),
        (0xDEAD, "unknown"),
    ],
)
def test_each_error_of_the_service_is_told_in_words(code: int, words: str) -> None:
    message = response(error=code, sizes=(0, 0), body=b"")
    with pytest.raises(EvidenceUnavailableError, match=words) as caught:
        parse_quote_response(message)
    assert f"{code:#010x}" in caught.value.message
    assert "qgsd" in caught.value.hint
    assert words in error_words(code)


def test_an_error_may_come_without_sizes() -> None:
    message = struct.pack("<HHIII", 1, 1, 1, 16, 0x12001)
    with pytest.raises(EvidenceUnavailableError, match="unexpected"):
        parse_quote_response(message)
    with pytest.raises(EvidenceMalformedError, match="no sizes"):
        parse_quote_response(struct.pack("<HHIII", 1, 1, 1, 16, 0))


def test_success_without_a_quote_is_unavailable() -> None:
    with pytest.raises(EvidenceUnavailableError, match="empty"):
        parse_quote_response(response(sizes=(0, 0), body=b""))


@pytest.mark.parametrize("length", [0, 15, MAX_MESSAGE_BYTES + 1, 2**31, 2**32 - 1])
def test_a_length_outside_the_bounds_is_refused(length: int) -> None:
    with pytest.raises(EvidenceMalformedError, match=f"of {length} bytes"):
        frame_length(length.to_bytes(4, "big"))


def test_the_bounds_themselves_are_taken() -> None:
    for length in (16, MAX_MESSAGE_BYTES):
        assert frame_length(length.to_bytes(4, "big")) == length


def test_a_length_of_the_wrong_byte_order_is_named() -> None:
    with pytest.raises(EvidenceMalformedError) as caught:
        frame_length((5024).to_bytes(4, "little"))
    assert "byte order" in caught.value.hint


@given(quote=st.binary(min_size=1, max_size=2000), minor=st.integers(0, 65535))
def test_what_is_sent_is_read(quote: bytes, minor: int) -> None:
    assert parse_quote_response(quote_response(quote, minor=minor)) == quote


@given(report=st.binary(min_size=1024, max_size=1024), minor=st.integers(0, 65535))
def test_what_is_asked_is_read(report: bytes, minor: int) -> None:
    assert parse_quote_request(quote_request(report, minor=minor)) == (minor, report)


@given(
    st.binary(max_size=200) | st.binary(max_size=64).map(lambda b: response()[:24] + b)
)
def test_no_bytes_do_worse_than_a_named_error(data: bytes) -> None:
    for parse in (parse_quote_response, parse_quote_request):
        with contextlib.suppress(EvidenceError):
            assert parse(data)


@given(st.integers(0, 24 * 8 - 1))
def test_one_flipped_bit_of_the_header_never_changes_the_quote(bit: int) -> None:
    data = bytearray(response())
    data[bit // 8] ^= 1 << bit % 8
    try:
        assert parse_quote_response(bytes(data)) == QUOTE
    except EvidenceError:
        return
    assert 2 <= bit // 8 < 4, "only the minor version may differ"


@given(st.binary(min_size=4, max_size=4))
def test_a_length_is_within_its_bounds_or_an_error(prefix: bytes) -> None:
    with contextlib.suppress(EvidenceMalformedError):
        assert 16 <= frame_length(prefix) <= MAX_MESSAGE_BYTES


# --- where it listens ----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("vsock:2:4050", QgsAddress(cid=2, port=4050)),
        ("vsock:2", QgsAddress(cid=2)),
        ("vsock:1:99999", QgsAddress(cid=1, port=99999)),
        ("unix:/run/qgs.sock", QgsAddress(path="/run/qgs.sock")),
    ],
)
def test_an_address_is_read_and_shown(text: str, address: QgsAddress) -> None:
    assert parse_qgs_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "vsock",
        "vsock:",
        "vsock:2:",
        "vsock:x:1",
        "vsock:2:3:4",
        "vsock:-1:4050",
        "vsock:4294967295:1",
        "vsock:2:4294967295",
        "unix:",
        "unix:run",
        "tcp:1:2",
        "vsock:2:" + "9" * 400,
        "vsock:٢:4050",
    ],
)
def test_another_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not vsock:CID"):
        parse_qgs_address(text)


@pytest.mark.parametrize(
    ("text", "port"),
    [
        ("port=4050", 4050),
        ("# comment\n\n  port = 4051  \n", 4051),
        ("port = 1\nport = 2\n", 1),
        ("port = x\nport = 2\n", 2),
        ("port = 12345678901\n", None),
        ("port = 4294967295\n", None),
        ("port = 0\n", None),
        ("#port = 4050\n", None),
        ("port = 4050 # QGS\n", None),
        ("", None),
    ],
)
def test_the_port_is_read_as_intels_library_reads_it(
    text: str, port: int | None
) -> None:
    assert port_of_attest_conf(text) == port
