"""PE images: the digest that firmware measures of one, and the sections of a kernel image.

Source: Microsoft PE Format, "Attribute Certificate Table"; Windows Authenticode Portable Executable
Signature Format, "Calculating the PE image hash"; edk2, DxeTpm2MeasureBootLib and TdTcg2Dxe
(MeasurePeImageAndExtend), which is what counts here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct

from tdxd.errors import DataError

__all__ = ["PeImage", "Section", "authenticode_sha384", "parse_pe"]

_DOS_BYTES = 64
_PE_OFFSET = 0x3C
_COFF = struct.Struct("<HHIIIHH")
_SECTION = struct.Struct("<8sIIIIIIHHI")
_CHECKSUM_AT = 64
_SIZE_OF_HEADERS_AT = 60
_CERTIFICATE_ENTRY = 4
_ENTRY_BYTES = 8
_DIRECTORIES_AT = {0x10B: 96, 0x20B: 112}
"""Where the data directories of PE32 and PE32+ start; their count stands in front of them."""
_MAX_SECTIONS = 96
"""What Windows loads at most; kernel images have about a dozen."""
_MAX_MEMORY_BYTES = 1 << 30
"""Of all sections: their memory may be larger than the file, and is made here."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One section: its place in the file, and how much memory it takes."""

    name: str
    file_offset: int
    file_bytes: int
    memory_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PeImage:
    """The layout of an image; offsets are those of the file.

    `certificates` is the place and size of the certificate table, both 0 if there is none;
    `certificate_entry` that of its entry in the headers, or None.
    """

    data: bytes
    checksum_offset: int
    certificate_entry: int | None
    certificates: tuple[int, int]
    header_bytes: int
    sections: tuple[Section, ...]

    def content_of(self, section: Section) -> bytes:
        """Return what the file has of a section's memory."""
        end = section.file_offset + min(section.file_bytes, section.memory_bytes)
        return self.data[section.file_offset : end]

    def memory_of(self, section: Section) -> bytes:
        """Return a section as it lies in memory: cut, or filled up with zeros."""
        return self.content_of(section).ljust(section.memory_bytes, b"\0")


def parse_pe(data: bytes, *, source: str = "image") -> PeImage:
    """Read the headers of a PE32 or PE32+ image.

    Raises: DataError for what is none, and for headers that point out of the file.
    """
    reader = _Headers(data, source)
    if data[:2] != b"MZ":
        raise DataError(f"{source} is no PE image: it does not begin with MZ")
    start = reader.number(_PE_OFFSET, 4)
    if reader.take(start, 4) != b"PE\0\0":
        raise DataError(f"{source} is no PE image: no PE signature at {start}")
    coff = _COFF.unpack(reader.take(start + 4, _COFF.size))
    count, optional_bytes = coff[1], coff[5]
    if count > _MAX_SECTIONS:
        text = f"{source} has {count} sections, more than {_MAX_SECTIONS}"
        raise DataError(text)
    optional = start + 4 + _COFF.size
    magic = reader.number(optional, 2)
    if magic not in _DIRECTORIES_AT:
        raise DataError(f"{source} is neither PE32 nor PE32+, but {magic:#x}")
    header_bytes = reader.number(optional + _SIZE_OF_HEADERS_AT, 4)
    table = optional + optional_bytes
    if not table + count * _SECTION.size <= header_bytes <= len(data):
        text = f"{source} says that its headers are {header_bytes} bytes long"
        raise DataError(text, hint="the file is cut short or not a PE image")
    entry = _certificate_entry(reader, optional, magic, table)
    image = PeImage(
        data=data,
        checksum_offset=optional + _CHECKSUM_AT,
        certificate_entry=entry,
        certificates=_certificates(reader, entry),
        header_bytes=header_bytes,
        sections=tuple(
            _section(reader, table + index * _SECTION.size) for index in range(count)
        ),
    )
    _check_end(image, source)
    return image


def authenticode_sha384(image: PeImage) -> bytes:
    """Return the SHA-384 that firmware extends when it loads the image, 48 bytes.

    Headers without checksum and certificate entry, the sections in the order of the file, and what
    follows them, without the certificate table. Firmware takes what follows to begin after as
    many bytes as it has hashed: gaps between sections shift it.
    """
    view = memoryview(image.data)
    hashed = hashlib.sha384(view[: image.checksum_offset])
    rest = image.checksum_offset + 4
    if image.certificate_entry is not None:
        hashed.update(view[rest : image.certificate_entry])
        rest = image.certificate_entry + _ENTRY_BYTES
    hashed.update(view[rest : image.header_bytes])
    done = image.header_bytes
    present = [one for one in image.sections if one.file_bytes]
    for one in sorted(present, key=lambda section: section.file_offset):
        hashed.update(view[one.file_offset : one.file_offset + one.file_bytes])
        done += one.file_bytes
    hashed.update(view[done : max(done, len(view) - image.certificates[1])])
    return hashed.digest()


def _certificate_entry(
    reader: _Headers, optional: int, magic: int, table: int
) -> int | None:
    directories = optional + _DIRECTORIES_AT[magic]
    if reader.number(directories - 4, 4) <= _CERTIFICATE_ENTRY:
        return None
    entry = directories + _CERTIFICATE_ENTRY * _ENTRY_BYTES
    if entry + _ENTRY_BYTES > table:
        text = f"{reader.source}: its data directories do not fit its headers"
        raise DataError(text)
    return entry


def _certificates(reader: _Headers, entry: int | None) -> tuple[int, int]:
    if entry is None:
        return 0, 0
    return reader.number(entry, 4), reader.number(entry + 4, 4)


def _section(reader: _Headers, offset: int) -> Section:
    fields = _SECTION.unpack(reader.take(offset, _SECTION.size))
    name = fields[0].rstrip(b"\0").decode("latin-1")
    section = Section(
        name=name, memory_bytes=fields[1], file_bytes=fields[3], file_offset=fields[4]
    )
    if section.file_bytes:
        reader.take(section.file_offset, section.file_bytes)
    return section


def _check_end(image: PeImage, source: str) -> None:
    """Refuse a certificate table that is not the end of the file: firmware does."""
    start, size = image.certificates
    hashed = image.header_bytes + sum(one.file_bytes for one in image.sections)
    if size and (start + size != len(image.data) or start < hashed):
        text = f"{source}: its certificate table of {size} bytes at {start} is not at the end"
        raise DataError(text, hint="sign the image again")
    if hashed > len(image.data):
        raise DataError(f"{source}: its sections overlap")
    memory_bytes = sum(one.memory_bytes for one in image.sections)
    if memory_bytes > _MAX_MEMORY_BYTES:
        text = f"{source}: its sections take {memory_bytes} bytes of memory"
        raise DataError(text, hint=f"at most {_MAX_MEMORY_BYTES} are read")


class _Headers:
    """Takes bytes by offset and never past the end."""

    def __init__(self, data: bytes, source: str) -> None:
        self._data = data
        self.source = source

    def take(self, offset: int, size: int) -> bytes:
        if offset + size > len(self._data):
            text = f"{self.source} needs {size} bytes at {offset} and has {len(self._data)}"
            raise DataError(text, hint="the file is cut short or not a PE image")
        return self._data[offset : offset + size]

    def number(self, offset: int, size: int) -> int:
        return int.from_bytes(self.take(offset, size), "little")
