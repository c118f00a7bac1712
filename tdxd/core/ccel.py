"""The ACPI table CCEL, which says where the firmware keeps its event log and how long it is.

Source: ACPI 6.5, section 5.2.34 (Confidential Computing Event Log).
"""

from __future__ import annotations

import dataclasses
import struct

from tdxd.core.eventlog import MAX_LOG_BYTES
from tdxd.errors import EvidenceMalformedError

__all__ = ["TABLE_BYTES", "CcelTable", "parse_ccel_table"]

TABLE_BYTES = 56
_SIGNATURE = b"CCEL"
_LENGTH = struct.Struct("<4sI")
_FIELDS = struct.Struct("<BBHQQ")
_HEADER_BYTES = 36
_TDX = 2


@dataclasses.dataclass(frozen=True, slots=True)
class CcelTable:
    """Length (LAML) and physical address (LASA) of the log area."""

    log_bytes: int
    log_address: int


def parse_ccel_table(data: bytes) -> CcelTable:
    """Read the table; the log area it names is at most 1 MiB.

    Raises: EvidenceMalformedError.
    """
    if len(data) < TABLE_BYTES:
        text = f"ACPI table CCEL is {len(data)} bytes long, not {TABLE_BYTES}"
        raise EvidenceMalformedError(text)
    signature, length = _LENGTH.unpack_from(data)
    if signature != _SIGNATURE or length != len(data):
        text = f"ACPI table CCEL is named {signature!r} and announces {length} bytes of {len(data)}"
        raise EvidenceMalformedError(text)
    if sum(data) % 256:
        raise EvidenceMalformedError("ACPI table CCEL has a wrong checksum")
    kind, _subtype, _reserved, log_bytes, address = _FIELDS.unpack_from(
        data, _HEADER_BYTES
    )
    if kind != _TDX:
        raise EvidenceMalformedError(
            f"ACPI table CCEL is of type {kind}, not {_TDX} (TDX)"
        )
    if not 0 < log_bytes <= MAX_LOG_BYTES or not address:
        text = f"ACPI table CCEL names a log of {log_bytes} bytes at {address:#x}"
        raise EvidenceMalformedError(text, hint=f"a log has 1 to {MAX_LOG_BYTES} bytes")
    return CcelTable(log_bytes, address)
