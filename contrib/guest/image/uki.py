"""A unified kernel image: systemd-stub with kernel, initrd and command line as sections.

Source: Microsoft, PE Format; systemd-stub(7); the UAPI group's UKI specification.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Mapping

__all__ = ["Section", "make_uki"]

_PE_OFFSET_AT = 0x3C
_COFF_BYTES, _COUNT_AT, _SYMBOLS_AT = 24, 6, 12
_SECTION = struct.Struct("<8sIIIIIIHHI")
_READ_ONLY_DATA = 0x40000040
_PAGE_BYTES = 4096
# In the optional header of PE32+.
_INITIALISED_AT, _FILE_ALIGNMENT_AT, _IMAGE_AT, _HEADERS_AT = 8, 36, 56, 60


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What was added, as the firmware measures it with the whole image."""

    size_bytes: int
    sha256: str


class _Image:
    """A PE image that grows."""

    def __init__(self, stub: bytes) -> None:
        (self.start,) = struct.unpack_from("<I", stub, _PE_OFFSET_AT)
        if stub[:2] != b"MZ" or stub[self.start : self.start + 4] != b"PE\0\0":
            raise ValueError("the stub is no PE image")
        self.optional = self.start + _COFF_BYTES
        self.count, optional_bytes = struct.unpack_from(
            "<H12xH", stub, self.start + _COUNT_AT
        )
        self.table = self.optional + optional_bytes
        self.data = bytearray(stub)
        own = [
            _SECTION.unpack_from(stub, self.table + number * _SECTION.size)
            for number in range(self.count)
        ]
        self.alignment = self.word(_FILE_ALIGNMENT_AT)
        # What lies behind the sections are symbols, which nobody needs.
        end = max(one[4] + one[3] for one in own)
        del self.data[end:]
        self.data += bytes(-end % self.alignment)
        self.address = max(one[2] + one[1] for one in own)
        struct.pack_into("<II", self.data, self.start + _SYMBOLS_AT, 0, 0)

    def word(self, place: int) -> int:
        """Return a field of the optional header."""
        (value,) = struct.unpack_from("<I", self.data, self.optional + place)
        return int(value)

    def set_word(self, place: int, value: int) -> None:
        struct.pack_into("<I", self.data, self.optional + place, value)

    def append(self, name: str, content: bytes) -> None:
        """Add a section at the next free page."""
        place = self.table + self.count * _SECTION.size
        if place + _SECTION.size > self.word(_HEADERS_AT):
            raise ValueError("the stub's headers have no room for more sections")
        raw = content + bytes(-len(content) % self.alignment)
        address = self.address + -self.address % _PAGE_BYTES
        where = (len(content), address, len(raw), len(self.data))
        header = (name.encode(), *where, 0, 0, 0, 0, _READ_ONLY_DATA)
        _SECTION.pack_into(self.data, place, *header)
        self.data += raw
        self.address = address + len(content)
        self.count += 1
        struct.pack_into("<H", self.data, self.start + _COUNT_AT, self.count)
        self.set_word(_INITIALISED_AT, self.word(_INITIALISED_AT) + len(raw))
        self.set_word(_IMAGE_AT, self.address + -self.address % _PAGE_BYTES)


def make_uki(
    stub: bytes, parts: Mapping[str, bytes]
) -> tuple[bytes, dict[str, Section]]:
    """Append sections to the stub, in this order.

    Raises: ValueError, if the stub is no PE image or its headers have no room.
    """
    image = _Image(stub)
    sections = {}
    for name, content in parts.items():
        image.append(name, content)
        digest = hashlib.sha256(content).hexdigest()
        sections[name] = Section(size_bytes=len(content), sha256=digest)
    return bytes(image.data), sections
