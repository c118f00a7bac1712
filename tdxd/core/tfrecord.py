"""TFRecord files: records behind a length, both with a masked CRC-32C.

Source: tensorflow/core/lib/io/record_writer.cc; tsl/lib/hash/crc32c.h (the mask); RFC 3720 B.4
(the checksum). In plain Python, 70 ms for the 600 kB of an image: a library for it would be
another binary on the machine that holds the keys.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Iterator

from tdxd.errors import DataError

__all__ = ["crc32c", "read_records", "write_records"]

_POLYNOMIAL = 0x82F63B78
"""Castagnoli's, its bits reversed."""
_MASK_DELTA = 0xA282EAD8
_HEAD = struct.Struct("<QI")
_TAIL = struct.Struct("<I")


@functools.cache
def _table() -> tuple[int, ...]:
    made = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)  # noqa: PLW2901
        made.append(value)
    return tuple(made)


def crc32c(data: bytes) -> int:
    """Return the CRC-32C of some bytes."""
    table = _table()
    crc = 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _masked(data: bytes) -> int:
    # A checksum of bytes that hold their own checksum would be constant; so it is turned.
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def write_records(records: Iterable[bytes]) -> bytes:
    """Return the content of a file that holds these records."""
    made = bytearray()
    for record in records:
        length = struct.pack("<Q", len(record))
        made += _HEAD.pack(len(record), _masked(length))
        made += record
        made += _TAIL.pack(_masked(record))
    return bytes(made)


def read_records(data: bytes, *, source: str) -> Iterator[bytes]:
    """Yield the records of a file.

    Raises: DataError for a file that is cut or whose checksums are wrong.
    """
    offset = 0
    while offset < len(data):
        end = offset + _HEAD.size
        if end > len(data):
            raise DataError(f"{source}: cut in the head of the record at byte {offset}")
        length, masked = _HEAD.unpack_from(data, offset)
        if masked != _masked(data[offset : offset + 8]):
            raise DataError(f"{source}: wrong checksum of the length at byte {offset}")
        record = data[end : end + length]
        if end + length + _TAIL.size > len(data):
            raise DataError(f"{source}: cut in the record at byte {offset}")
        if _TAIL.unpack_from(data, end + length)[0] != _masked(record):
            raise DataError(f"{source}: wrong checksum of the record at byte {offset}")
        yield record
        offset = end + length + _TAIL.size
