"""Quotes are read by fixed offsets, and anything that is not quite one is refused."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core.quote import (
    MAX_QUOTE_BYTES,
    TD_ATTRIBUTE_BITS,
    BodyKind,
    Quote,
    parse_quote,
    td_attribute_names,
    td_attributes_bytes,
)
from tdxd.errors import EvidenceMalformedError
from tests.vectors import expected, needs_vectors, quote_bytes, quote_names

BODIES = {BodyKind.TD10: 584, BodyKind.TD15: 648, BodyKind.TD15_EX: 885}
NUMBERS = {BodyKind.TD10: 2, BodyKind.TD15: 3, BodyKind.TD15_EX: 4}


def make(version: int, kind: BodyKind, *, signature: bytes = bytes(200)) -> bytes:
    """A quote whose body bytes count up, so that every field differs."""
    header = struct.pack("<HHI", version, 2, 0x81) + bytes(40)
    if version == 5:
        header += struct.pack("<HI", NUMBERS[kind], BODIES[kind])
    body = bytes(index * 7 % 251 for index in range(BODIES[kind]))
    return header + body + struct.pack("<I", len(signature)) + signature


ALL = [make(4, BodyKind.TD10), *(make(5, kind) for kind in BODIES)]


@needs_vectors
@pytest.mark.parametrize("name", quote_names())
def test_real_quotes_read_as_expected(name: str) -> None:
    quote = parse_quote(quote_bytes(name))
    want = expected(name)
    assert quote.version == want["version"]
    assert quote.body.value == want["body"].replace("TdReport", "TD")
    for field in (
        "tee_tcb_svn",
        "mr_seam",
        "mr_signer_seam",
        "seam_attributes",
        "td_attributes",
        "xfam",
        "mr_td",
        "mr_config_id",
        "mr_owner",
        "mr_owner_config",
        "report_data",
    ):
        assert getattr(quote, field).hex() == want[field], field
    assert [value.hex() for value in quote.rtmrs] == [
        want[f"rt_mr{index}"] for index in range(4)
    ]
    assert list(td_attribute_names(quote.td_attributes)) == want["td_attributes_bits"]
    for field in ("tee_tcb_svn2", "mr_service_td", "td_id"):
        value = getattr(quote, field)
        assert (value.hex() if value is not None else None) == want.get(field), field
    assert quote.vmid == want.get("vmid")


@pytest.mark.parametrize("data", ALL, ids=["v4", "v5-td10", "v5-td15", "v5-td15ex"])
def test_cut_at_every_byte_is_refused(data: bytes) -> None:
    parse_quote(data)
    for size in range(len(data)):
        with pytest.raises(EvidenceMalformedError):
            parse_quote(data[:size])


@pytest.mark.parametrize("data", ALL, ids=["v4", "v5-td10", "v5-td15", "v5-td15ex"])
def test_trailing_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(EvidenceMalformedError, match="signature data"):
        parse_quote(data + b"\0")


def test_every_body_byte_belongs_to_one_field() -> None:
    data = make(5, BodyKind.TD15)
    plain = parse_quote(data)
    for offset in range(54, 54 + BODIES[BodyKind.TD15]):
        changed = bytearray(data)
        changed[offset] ^= 0xFF
        assert parse_quote(bytes(changed)) != plain, offset


def test_absent_fields_are_none() -> None:
    quote = parse_quote(make(4, BodyKind.TD10))
    assert quote.mr_service_td is None
    assert quote.vmid is None


@pytest.mark.parametrize(
    ("offset", "value", "text"),
    [
        (0, b"\x03\x00", "quote version is 3, not 4 or 5"),
        (0, b"\x06\x00", "quote version is 6, not 4 or 5"),
        (2, b"\x03\x00", "quote key type is 3, not 2 (ECDSA P-256)"),
        (4, b"\x00\x00\x00\x00", "quote TEE type is 0x0, not 0x81 (TDX)"),
        (48, b"\x01\x00", "quote body type is 1, not a TD report (2 to 4)"),
        (50, b"\x00\x00", "quote body of type 3 is 0 bytes long, not 648"),
    ],
)
def test_wrong_header_is_named(offset: int, value: bytes, text: str) -> None:
    data = bytearray(make(5, BodyKind.TD15))
    data[offset : offset + len(value)] = value
    with pytest.raises(EvidenceMalformedError) as caught:
        parse_quote(bytes(data))
    assert caught.value.message == text


def test_signature_data_too_small_to_be_one_is_refused() -> None:
    with pytest.raises(EvidenceMalformedError, match="signature data"):
        parse_quote(make(4, BodyKind.TD10, signature=bytes(133)))


def test_longer_than_the_limit_is_refused() -> None:
    rest = bytes(MAX_QUOTE_BYTES - 48 - 584 - 4)
    parse_quote(make(4, BodyKind.TD10, signature=rest))
    with pytest.raises(EvidenceMalformedError, match="16385 bytes long"):
        parse_quote(make(4, BodyKind.TD10, signature=rest + b"\0"))


@given(st.binary(max_size=1200))
def test_any_bytes_give_a_quote_or_the_error(data: bytes) -> None:
    with contextlib.suppress(EvidenceMalformedError):
        assert isinstance(parse_quote(data), Quote)


@given(st.sampled_from(ALL), st.integers(0, 1100), st.integers(1, 255))
def test_any_changed_byte_gives_a_quote_or_the_error(
    data: bytes, offset: int, change: int
) -> None:
    changed = bytearray(data)
    changed[offset % len(data)] ^= change
    with contextlib.suppress(EvidenceMalformedError):
        assert isinstance(parse_quote(bytes(changed)), Quote)


@given(st.sets(st.sampled_from(sorted(TD_ATTRIBUTE_BITS))))
def test_attribute_names_and_bytes_are_inverse(names: set[str]) -> None:
    assert set(td_attribute_names(td_attributes_bytes(names))) == names


def test_unnamed_attribute_bits_are_shown() -> None:
    assert td_attribute_names(bytes([0x02, 0, 0x04, 0, 0, 0, 0, 0])) == (
        "BIT_1",
        "BIT_18",
    )


def test_unknown_attribute_name_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown TD attribute 'DEBUGGING'"):
        td_attributes_bytes(["DEBUGGING"])
