"""The partition table of a disk image: what firmware measures of it, and where the ESP lies.

Source: UEFI 2.10, section 5.3 (GPT); TCG PC Client Platform Firmware Profile 1.06, section 10.4.1
(UEFI_GPT_DATA); edk2, DxeTpm2MeasureBootLib (Tcg2MeasureGptTable): the primary table's header and
each entry that has a type, with the disk's GUID and the partitions' in them.
"""

from __future__ import annotations

import dataclasses
import struct
import uuid
import zlib

from tdxd.errors import DataError

__all__ = ["SECTOR_BYTES", "TABLE_MAX_BYTES", "GptTable", "parse_gpt"]

SECTOR_BYTES = 512
"""Clouds show disks of this sector size; a table of 4096-byte sectors is another one."""
_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_HEADER_BYTES = 92
_ENTRY = struct.Struct("<16s16sQQQ72s")
_SIGNATURE = b"EFI PART"
_ENTRIES_MAX = 1024
_ENTRY_BYTES_MAX = 4096
_SECTORS_MAX = 1 << 50
TABLE_MAX_BYTES = 2 << 20
"""Where the table of a sane disk ends, counted from its start."""
_ESP = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GptTable:
    """What firmware measures, and the first EFI system partition in bytes (None: none)."""

    event_data: bytes
    disk: uuid.UUID
    esp: tuple[int, int] | None


def parse_gpt(head: bytes, *, source: str = "disk") -> GptTable:
    """Read the primary table from the first `TABLE_MAX_BYTES` of a disk, or all of a smaller one.

    Raises: DataError.
    """
    fields = _HEADER.unpack(_take(head, SECTOR_BYTES, _HEADER_BYTES, source))
    if fields[0] != _SIGNATURE:
        text = f"{source} has no GUID partition table: no EFI PART in its second sector"
        raise DataError(text, hint="give a raw disk image, or the UKI itself")
    header_bytes, checksum, where = fields[2], fields[3], fields[5]
    first_entry, count, entry_bytes, entries_checksum = fields[10:14]
    plain = _take(head, SECTOR_BYTES, _HEADER_BYTES, source)
    if header_bytes != _HEADER_BYTES or where != 1:
        raise DataError(f"{source}: its partition table is of an unknown form")
    if zlib.crc32(plain[:16] + bytes(4) + plain[20:]) != checksum:
        raise DataError(f"{source}: the header of its partition table has a wrong CRC")
    if not (count <= _ENTRIES_MAX and _ENTRY.size <= entry_bytes <= _ENTRY_BYTES_MAX):
        text = (
            f"{source}: its partition table has {count} entries of {entry_bytes} bytes"
        )
        raise DataError(text)
    table = _take(head, first_entry * SECTOR_BYTES, count * entry_bytes, source)
    if zlib.crc32(table) != entries_checksum:
        raise DataError(
            f"{source}: the entries of its partition table have a wrong CRC"
        )
    entries = [
        table[start : start + entry_bytes]
        for start in range(0, len(table), entry_bytes)
        if any(table[start : start + 16])
    ]
    measured = plain + struct.pack("<Q", len(entries)) + b"".join(entries)
    return GptTable(
        event_data=measured,
        disk=uuid.UUID(bytes_le=fields[9]),
        esp=_esp(entries, source),
    )


def _esp(entries: list[bytes], source: str) -> tuple[int, int] | None:
    for entry in entries:
        kind, _, first, last, _, _ = _ENTRY.unpack_from(entry)
        if uuid.UUID(bytes_le=kind) == _ESP:
            if last < first:
                raise DataError(
                    f"{source}: its EFI system partition ends before it starts"
                )
            if last >= _SECTORS_MAX:
                text = f"{source}: its EFI system partition ends at sector {last}"
                raise DataError(text, hint="no disk is so large")
            return first * SECTOR_BYTES, (last - first + 1) * SECTOR_BYTES
    return None


def _take(data: bytes, offset: int, size: int, source: str) -> bytes:
    if offset + size > len(data):
        text = (
            f"{source} is cut short: its partition table needs {size} bytes at {offset}"
        )
        raise DataError(text)
    return data[offset : offset + size]
