"""Writes into OVMF's file of variables, as a host can that keeps it.

Source: edk2, MdeModulePkg/Include/Guid/VariableFormat.h (authenticated variables).
"""

from __future__ import annotations

import struct
import uuid
from pathlib import Path

__all__ = ["write_variable"]

_STORE = uuid.UUID("aaf32c78-947b-439a-a180-2e144ec37792").bytes_le
_STORE_HEADER_BYTES = 28
_VARIABLE = struct.Struct("<HBBIQ16sIII16s")
_START, _ADDED = 0x55AA, 0x3F
_ATTRIBUTES = 7
"""Non-volatile, and there for the firmware and the system."""


def write_variable(flash: Path, name: str, vendor: str, value: bytes) -> None:
    """Append a variable to the store; none of that name may be there."""
    data = bytearray(flash.read_bytes())
    place = data.index(_STORE) + _STORE_HEADER_BYTES
    while struct.unpack_from("<H", data, place)[0] == _START:
        fields = _VARIABLE.unpack_from(data, place)
        place += _aligned(_VARIABLE.size + fields[7] + fields[8])
    text = name.encode("utf-16-le") + b"\0\0"
    sizes = (len(text), len(value))
    guid = uuid.UUID(vendor).bytes_le
    header = (_START, _ADDED, 0, _ATTRIBUTES, 0, bytes(16), 0, *sizes, guid)
    whole = _VARIABLE.pack(*header) + text + value
    data[place : place + len(whole)] = whole
    flash.write_bytes(data)


def _aligned(size: int) -> int:
    return size + -size % 4
