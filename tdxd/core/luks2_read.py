"""The strict reader of a LUKS2 header that the host may have written or changed.

A LUKS2 header proves nothing: its checksum has no key, and its digest vouches for the volume key
alone, not for the cipher or the place that the key is used with. So nothing is taken but one shape
of header (`luks2_json` says which), with both copies whole, alike and where they belong. No copy is
searched for, nothing is repaired, and nothing beyond validated numbers leaves this module.

Source: LUKS2 On-Disk Format Specification 1.1.1, §2 (binary header, copies, checksum).
"""

from __future__ import annotations

import dataclasses
import hashlib
import re

from tdxd.core.luks2_json import Digest, Keyslot, parse_document
from tdxd.core.luks2_layout import (
    BINARY,
    BINARY_BYTES,
    CHECKSUM_BYTES,
    CHECKSUM_OFFSET,
    COPY_BYTES,
    KEYSLOT_OFFSET,
    MAGICS,
)
from tdxd.errors import BadHeaderError

__all__ = ["COPIES_BYTES", "REGION_MAX_BYTES", "Luks2Header", "read_luks2"]

COPIES_BYTES = KEYSLOT_OFFSET
"""Both copies of the header: what `read_luks2` looks at."""
REGION_MAX_BYTES = 64 * 2**20
"""How much of the start of a file may lie before its payload; luksFormat leaves 16 MiB."""
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Luks2Header:
    """What it takes to unlock and to map an image: numbers within their bounds.

    `payload_bytes` is what follows `payload_offset_bytes` in the file, in whole sectors of
    `sector_bytes` (512 or 4096). The uuid is the only text of the host's choosing: 36
    lower-case hex digits and hyphens.
    """

    uuid: str
    payload_offset_bytes: int
    payload_bytes: int
    sector_bytes: int
    keyslots: tuple[Keyslot, ...]
    digest: Digest


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Copy:
    """One copy of the header whose checksum is right."""

    sequence: int
    uuid: str
    area: bytes


def read_luks2(region: bytes, *, image_bytes: int, source: str) -> Luks2Header:
    """Read the header of an image of `image_bytes` from the start of it.

    `region` is at least `COPIES_BYTES` long, and private: the caller read it once. The keyslot
    areas need not be in it. Costs a few milliseconds whatever it says.

    Raises: BadHeaderError, naming the field and its value.
    """
    if len(region) < COPIES_BYTES:
        text = f"{source}: ends after {len(region)} bytes, inside its LUKS2 header"
        raise BadHeaderError(text, hint="the file is truncated; copy it again")
    first, second = (_read_copy(region, number, source) for number in (0, 1))
    for field in ("sequence", "uuid", "area"):
        if getattr(first, field) != getattr(second, field):
            hint = "was it copied while cryptsetup wrote to it? copy it again"
            raise BadHeaderError(
                f"{source}: the two copies of the LUKS2 header differ in their {field}",
                hint=hint,
            )
    document = parse_document(first.area, source=f"{source}: LUKS2 header")
    offset, sector = document.payload_offset_bytes, document.sector_bytes
    if offset > REGION_MAX_BYTES:
        text = f"{source}: LUKS2 header: segments.0.offset: {offset}, at most {REGION_MAX_BYTES}"
        raise BadHeaderError(
            text, hint="make the image with cryptsetup's default layout"
        )
    payload_bytes = (image_bytes - offset) // sector * sector
    if payload_bytes <= 0:
        text = f"{source}: {image_bytes} bytes, its payload begins at {offset}"
        raise BadHeaderError(text, hint="the file is truncated; copy it again")
    return Luks2Header(
        uuid=first.uuid,
        payload_offset_bytes=offset,
        payload_bytes=payload_bytes,
        sector_bytes=sector,
        keyslots=tuple(document.keyslots.values()),
        digest=document.digest,
    )


def _read_copy(region: bytes, number: int, source: str) -> _Copy:
    start = number * COPY_BYTES
    data = region[start : start + COPY_BYTES]
    binary = BINARY.unpack_from(data)
    magic, version, size, sequence, label, algorithm = binary[:6]
    _, uuid, subsystem, offset, padding, checksum = binary[6:]
    name = f"{source}: LUKS2 header, copy {number + 1}"
    if magic != MAGICS[number]:
        if number == 0:
            hint = "is it an image of cryptsetup luksFormat, and does it begin with its header?"
            raise BadHeaderError(f"{source}: not a LUKS2 image", hint=hint)
        raise BadHeaderError(f"{name}: no magic number at {start}", hint=_DAMAGED)
    if (version, number) == (1, 0):
        hint = "convert a copy of it: cryptsetup convert --type luks2 IMAGE"
        raise BadHeaderError(f"{source}: a LUKS1 image", hint=hint)
    uuid_text = _text(uuid)
    facts = (
        ("version", version, version == 2, ""),
        ("hdr_size", size, size == COPY_BYTES, _SIZE),
        ("hdr_offset", offset, offset == start, _DAMAGED),
        ("csum_alg", _text(algorithm), _text(algorithm) == "sha256", ""),
        ("label", _text(label), not any(label), _LABEL),
        ("subsystem", _text(subsystem), not any(subsystem), _LABEL),
        ("uuid", uuid_text, _UUID.fullmatch(uuid_text) is not None, ""),
        ("checksum", "wrong", checksum == _checksum(data), _DAMAGED),
    )
    for field, value, good, hint in facts:
        if not good:
            raise BadHeaderError(f"{name}: {field} {value!r}"[:300], hint=hint)
    if any(padding) or any(data[BINARY.size : BINARY_BYTES]):
        raise BadHeaderError(f"{name}: padding is not zero", hint=_DAMAGED)
    return _Copy(sequence=sequence, uuid=uuid_text, area=data[BINARY_BYTES:])


_DAMAGED = "the file is damaged or was tampered with; copy it again"
_SIZE = "only the usual size of 16384 is taken: no --luks2-metadata-size"
_LABEL = "take it from a copy: cryptsetup config --label '' --subsystem '' IMAGE"


def _checksum(data: bytes) -> bytes:
    blank = bytearray(data)
    blank[CHECKSUM_OFFSET : CHECKSUM_OFFSET + CHECKSUM_BYTES] = bytes(CHECKSUM_BYTES)
    return hashlib.sha256(blank).digest().ljust(CHECKSUM_BYTES, b"\0")


def _text(field: bytes) -> str:
    """Return a NUL-padded field; bytes after a NUL, and others than ASCII, stay to be seen."""
    return field.rstrip(b"\0").decode("latin-1")
