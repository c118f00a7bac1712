"""The ACPI table that names the event log."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core.ccel import CcelTable, parse_ccel_table
from tdxd.errors import EvidenceMalformedError


def table(
    *,
    signature: bytes = b"CCEL",
    length: int = 56,
    kind: int = 2,
    log_bytes: int = 65536,
    address: int = 0x7F000000,
    checksum_off: int = 0,
) -> bytes:
    head = struct.pack("<4sIBB", signature, length, 1, 0) + b"INTEL EDK2".ljust(26)
    data = bytearray(head + struct.pack("<BBHQQ", kind, 0, 0, log_bytes, address))
    data[9] = (checksum_off - sum(data)) % 256
    return bytes(data)


def test_length_and_address_stand_at_40_and_48() -> None:
    data = table()
    assert struct.unpack_from("<QQ", data, 40) == (65536, 0x7F000000)
    assert parse_ccel_table(data) == CcelTable(65536, 0x7F000000)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"signature": b"TPM2"}, "is named"),
        ({"length": 57}, "announces 57 bytes of 56"),
        ({"checksum_off": 1}, "checksum"),
        ({"kind": 1}, "type 1"),
        ({"log_bytes": 0}, "a log of 0 bytes"),
        ({"log_bytes": 1024 * 1024 + 1}, "a log of 1048577 bytes"),
        ({"log_bytes": 2**64 - 1}, "a log of 18446744073709551615 bytes"),
        ({"address": 0}, "at 0x0"),
    ],
)
def test_a_table_that_lies_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(EvidenceMalformedError, match=words):
        parse_ccel_table(table(**changed))


@given(st.binary(max_size=80) | st.binary(max_size=60).map(lambda b: table()[:40] + b))
def test_no_bytes_do_worse_than_a_named_error(data: bytes) -> None:
    with contextlib.suppress(EvidenceMalformedError):
        assert 0 < parse_ccel_table(data).log_bytes <= 1024 * 1024
