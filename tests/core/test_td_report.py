"""TDREPORT by its offsets, and the ioctl's number."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from tdxd.core.td_report import (
    TD_REPORT_BYTES,
    TDX_CMD_GET_REPORT0,
    encode_td_report,
    parse_td_report,
)
from tdxd.errors import EvidenceMalformedError
from tdxd.sim.platform import SimPlatform

OFFSETS = {
    "report_data": 128,
    "td_attributes": 512,
    "xfam": 520,
    "mr_td": 528,
    "mr_config_id": 576,
    "mr_owner": 624,
    "mr_owner_config": 672,
    "mr_service_td": 912,
    "tee_tcb_svn": 264,
    "mr_seam": 280,
    "mr_signer_seam": 328,
    "seam_attributes": 376,
    "tee_tcb_svn2": 384,
}
RTMRS = (720, 768, 816, 864)


@pytest.fixture(scope="module")
def report() -> bytes:
    """A report with another byte in every place: byte n is n * 7 + n // 256."""
    data = bytearray((n * 7 + n // 256) % 256 for n in range(TD_REPORT_BYTES))
    data[:4] = bytes((0x81, 0, 1, 0))
    return bytes(data)


def test_the_ioctl_has_the_kernels_number() -> None:
    """_IOWR('T', 1, 64 + 1024 bytes)."""
    assert TDX_CMD_GET_REPORT0 == 0xC4405401


@pytest.mark.parametrize(("name", "offset"), OFFSETS.items())
def test_each_field_stands_at_its_offset(report: bytes, name: str, offset: int) -> None:
    value = getattr(parse_td_report(report), name)
    assert value == report[offset : offset + len(value)]


def test_the_rtmrs_stand_at_their_offsets(report: bytes) -> None:
    expected = tuple(report[start : start + 48] for start in RTMRS)
    assert parse_td_report(report).rtmrs == expected


def test_without_service_tds_their_field_does_not_count(report: bytes) -> None:
    older = report[:2] + b"\0" + report[3:]
    assert parse_td_report(older).mr_service_td is None


@pytest.mark.parametrize("size", [0, 1023, 1025])
def test_another_size_is_refused(size: int) -> None:
    with pytest.raises(EvidenceMalformedError, match=f"{size} bytes"):
        parse_td_report(bytes(size))


@pytest.mark.parametrize("kind", [0, 0x80, 0xFF])
def test_a_report_of_another_tee_is_refused(report: bytes, kind: int) -> None:
    with pytest.raises(EvidenceMalformedError, match=f"type {kind:#04x}"):
        parse_td_report(bytes((kind,)) + report[1:])


def test_what_is_encoded_is_read_back(report: bytes) -> None:
    fields = parse_td_report(report)
    again = encode_td_report(fields, mac=bytes(range(32)))
    assert parse_td_report(again) == fields
    assert again[224:256] == bytes(range(32))
    assert struct.unpack_from("<4B", again) == (0x81, 0, 1, 0)


def test_a_td_report_tells_what_a_quote_tells() -> None:
    platform = SimPlatform.create()
    found = parse_td_report(platform.td_report(b"d" * 64))
    expected = platform.report(b"d" * 64)
    assert dataclasses.replace(found, tee_tcb_svn2=None) == expected
