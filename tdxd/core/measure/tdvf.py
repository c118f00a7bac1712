"""MRTD of a TD that QEMU and KVM start with a firmware file: computed from its TDX metadata.

The measured build of a TD is a sequence of calls to the TDX module: TDH.MEM.PAGE.ADD for each page
of each section, and TDH.MR.EXTEND for each 256 bytes of a section that is marked as measured. KVM
adds and extends a page before it goes to the next; other VMMs may go in another order, or measure
more, and then have another MRTD.

Source: Intel TDX Virtual Firmware Design Guide, sections 4.2 and 11 (metadata); Intel TDX Module
ABI Specification, TDH.MEM.PAGE.ADD and TDH.MR.EXTEND; QEMU, target/i386/kvm/tdx.c
(tdx_finalize_vm).
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import uuid
from collections.abc import Sequence

from tdxd.errors import DataError

__all__ = ["FIRMWARE_MAX_BYTES", "TdvfSection", "mrtd", "parse_tdvf"]

FIRMWARE_MAX_BYTES = 64 << 20
_PAGE_BYTES, _CHUNK_BYTES = 4096, 256
_FOOTER = uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
_METADATA_OFFSET = uuid.UUID("e47a6535-984a-4798-865e-4685a7bf8ec2").bytes_le
_AFTER_FOOTER_BYTES = 32
_ENTRY_END_BYTES = 18
"""Entries are read backwards: data, then u16 length of all, then a GUID."""
_DESCRIPTOR = struct.Struct("<4sIII")
_SECTION = struct.Struct("<IIQQII")
_SECTIONS_MAX = 64
_MEMORY_MAX_BYTES = 1 << 30
_EXTENDED, _ADDED_LATER = 1, 2
_OPERATION = struct.Struct("<16sQ104x")
_HINT = "give an OVMF.fd with TDX metadata: code and variables in one file"


@dataclasses.dataclass(frozen=True, slots=True)
class TdvfSection:
    """One section of the metadata, as it stands there."""

    file_offset: int
    file_bytes: int
    address: int
    memory_bytes: int
    kind: int
    attributes: int


def parse_tdvf(firmware: bytes, *, source: str = "firmware") -> tuple[TdvfSection, ...]:
    """Read the sections of the TDX metadata.

    Raises: DataError.
    """
    start = _descriptor_offset(firmware, source)
    signature, _, version, count = _DESCRIPTOR.unpack_from(firmware, start)
    if signature != b"TDVF" or version != 1 or count > _SECTIONS_MAX:
        text = f"{source}: its TDX metadata is of an unknown form"
        raise DataError(text, hint=_HINT)
    end = start + _DESCRIPTOR.size + count * _SECTION.size
    if end > len(firmware):
        raise DataError(f"{source}: its TDX metadata is cut short", hint=_HINT)
    table = firmware[start + _DESCRIPTOR.size : end]
    sections = tuple(TdvfSection(*fields) for fields in _SECTION.iter_unpack(table))
    for one in sections:
        _check(one, firmware, source)
    if sum(one.memory_bytes for one in sections) > _MEMORY_MAX_BYTES:
        raise DataError(f"{source}: its TDX metadata asks for too much memory")
    return sections


def mrtd(firmware: bytes, sections: Sequence[TdvfSection]) -> bytes:
    """Return MRTD, 48 bytes, of a TD that QEMU and KVM start with this firmware."""
    register = hashlib.sha384()
    view = memoryview(firmware)
    for one in sections:
        if one.attributes & _ADDED_LATER:
            continue  # TDH.MEM.PAGE.AUG: the guest accepts these itself
        for page in range(0, one.memory_bytes, _PAGE_BYTES):
            address = one.address + page
            register.update(_OPERATION.pack(b"MEM.PAGE.ADD", address))
            if not one.attributes & _EXTENDED:
                continue
            for chunk in range(0, _PAGE_BYTES, _CHUNK_BYTES):
                register.update(_OPERATION.pack(b"MR.EXTEND", address + chunk))
                place = one.file_offset + page + chunk
                register.update(view[place : place + _CHUNK_BYTES])
    return register.digest()


def _descriptor_offset(firmware: bytes, source: str) -> int:
    end = len(firmware) - _AFTER_FOOTER_BYTES
    if end < _ENTRY_END_BYTES or firmware[end - 16 : end] != _FOOTER:
        raise DataError(
            f"{source} is no OVMF firmware: it has no table at its end", hint=_HINT
        )
    (table_bytes,) = struct.unpack_from("<H", firmware, end - _ENTRY_END_BYTES)
    first = max(0, end - table_bytes)
    end -= _ENTRY_END_BYTES
    while end - _ENTRY_END_BYTES >= first:
        (entry_bytes,) = struct.unpack_from("<H", firmware, end - _ENTRY_END_BYTES)
        if not _ENTRY_END_BYTES <= entry_bytes <= end - first:
            raise DataError(f"{source}: the table at its end is broken", hint=_HINT)
        if firmware[end - 16 : end] == _METADATA_OFFSET:
            if entry_bytes != _ENTRY_END_BYTES + 4:
                raise DataError(f"{source}: the table at its end is broken", hint=_HINT)
            (back,) = struct.unpack_from("<I", firmware, end - entry_bytes)
            if not _DESCRIPTOR.size <= back <= len(firmware):
                text = f"{source}: its TDX metadata lies outside of the file"
                raise DataError(text, hint=_HINT)
            return len(firmware) - int(back)
        end -= entry_bytes
    raise DataError(f"{source} has no TDX metadata", hint=_HINT)


def _check(one: TdvfSection, firmware: bytes, source: str) -> None:
    where = f"{source}: section of {one.memory_bytes} bytes at {one.address:#x}"
    if one.address % _PAGE_BYTES or one.memory_bytes % _PAGE_BYTES:
        raise DataError(f"{where} is not of whole pages")
    if one.address + one.memory_bytes >= 1 << 52:
        raise DataError(f"{where} is outside of what a machine can have")
    if one.file_offset + one.file_bytes > len(firmware):
        raise DataError(f"{where} is outside of the file", hint=_HINT)
    if one.attributes & ~(_EXTENDED | _ADDED_LATER):
        raise DataError(f"{where} has unknown attributes {one.attributes:#x}")
    if one.attributes & _EXTENDED and one.file_bytes != one.memory_bytes:
        raise DataError(f"{where} is measured, and only partly in the file")
