"""The CCEL event log: read it strictly, replay it to the RTMRs, write one.

A replay proves the digests only. The type and the data of an event are covered by nothing but
that event type's own rule, so no meaning may be read from them without recomputing it.

Source: TCG PC Client Platform Firmware Profile 1.06, sections 9.2.2 (SHA-1 format of the first
event), 9.2.3 (crypto agile events) and 9.4.5.1 (Spec ID event); TDX Virtual Firmware Design
Guide: MR index 0 is MRTD, 1 to 4 are RTMR0 to 3. All integers are little-endian.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Iterable, Sequence
from typing import Any

from tdxd.errors import EvidenceMalformedError

__all__ = [
    "EV_NO_ACTION",
    "MAX_EVENTS",
    "MAX_LOG_BYTES",
    "RTMR_COUNT",
    "Event",
    "encode_event_log",
    "extend",
    "parse_event_log",
    "replay",
]

MAX_LOG_BYTES = 1 << 20
"""Real logs are 10 to 64 KiB; firmware reserves at most this much."""
MAX_EVENTS = 4096
MAX_DIGESTS = 4
"""Digest algorithms in one log; CCEL writes SHA-384 alone."""
RTMR_COUNT = 4
EV_NO_ACTION = 3
SHA384 = 0x000C
_DIGEST_BYTES = {0x0004: 20, 0x000B: 32, SHA384: 48, 0x000D: 64, 0x0012: 32}
"""Sizes by TPM_ALG_ID: SHA-1, SHA-256, SHA-384, SHA-512, SM3-256."""
_SPEC_ID = b"Spec ID Event03\0"
_SHA1_HEADER = struct.Struct("<II20sI")
_SPEC_ID_HEADER = struct.Struct("<16sI4BI")
_EVENT_HEADER = struct.Struct("<III")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One event; `rtmr` is 0 to 3, or -1 for MRTD; `digest` is SHA-384, 48 bytes."""

    rtmr: int
    type: int
    digest: bytes
    data: bytes


def parse_event_log(
    log: bytes, *, last_register: int = RTMR_COUNT
) -> tuple[Event, ...]:
    """Read every event after the Spec ID header; an empty log has none.

    The log of a TPM has the same form: with `last_register` 23, `rtmr` is its PCR less one.

    After the last event only padding may follow, all 0x00 or all 0xFF.

    Raises: EvidenceMalformedError for anything else, or beyond the caps of this module.
    """
    if not log:
        return ()
    if len(log) > MAX_LOG_BYTES:
        text = f"event log is {len(log)} bytes long, more than {MAX_LOG_BYTES}"
        raise EvidenceMalformedError(text)
    reader = _Reader(log)
    sizes = _read_spec_id(reader)
    events: list[Event] = []
    while not reader.at_padding():
        if len(events) == MAX_EVENTS:
            raise EvidenceMalformedError(
                f"event log holds more than {MAX_EVENTS} events"
            )
        events.append(_read_event(reader, sizes, last_register))
    return tuple(events)


def replay(events: Iterable[Event]) -> tuple[bytes, bytes, bytes, bytes]:
    """Return RTMR0 to RTMR3, 48 bytes each, as the events extend them from zero.

    Events of type EV_NO_ACTION extend nothing, nor do those of MRTD.
    """
    registers = [bytes(48)] * RTMR_COUNT
    for event in events:
        if event.rtmr >= 0 and event.type != EV_NO_ACTION:
            registers[event.rtmr] = extend(registers[event.rtmr], event.digest)
    return registers[0], registers[1], registers[2], registers[3]


def extend(register: bytes, digest: bytes) -> bytes:
    """Return SHA-384(register ‖ digest), both 48 bytes: what the TDX module computes."""
    return hashlib.sha384(register + digest).digest()


def encode_event_log(events: Sequence[Event], *, size_bytes: int = 0) -> bytes:
    """Write a log with the Spec ID header and SHA-384 digests.

    It is padded with 0xFF to `size_bytes`, as firmware's reserved area is.
    """
    spec = _SPEC_ID_HEADER.pack(_SPEC_ID, 0, 0, 2, 0, 2, 1)
    spec += struct.pack("<HHB", SHA384, 48, 0)
    parts = [_SHA1_HEADER.pack(1, EV_NO_ACTION, bytes(20), len(spec)), spec]
    for event in events:
        parts.append(_EVENT_HEADER.pack(event.rtmr + 1, event.type, 1))
        parts.append(struct.pack("<H", SHA384) + event.digest)
        parts.append(struct.pack("<I", len(event.data)) + event.data)
    return b"".join(parts).ljust(size_bytes, b"\xff")


def _read_spec_id(reader: _Reader) -> dict[int, int]:
    """Read the first event; return the digest size of each algorithm it declares."""
    register, kind, _, size = reader.unpack(_SHA1_HEADER)
    if register > 1 or kind != EV_NO_ACTION:  # td-shim writes 0, OVMF writes 1
        raise EvidenceMalformedError("event log does not start with a Spec ID event")
    spec = _Reader(reader.take(size))
    signature, _, _, _, _, _, count = spec.unpack(_SPEC_ID_HEADER)
    if signature != _SPEC_ID:
        raise EvidenceMalformedError(
            f"event log's signature is {signature!r}, not {_SPEC_ID!r}"
        )
    if not 1 <= count <= MAX_DIGESTS:
        text = f"event log declares {count} digest algorithms, not 1 to {MAX_DIGESTS}"
        raise EvidenceMalformedError(text)
    sizes: dict[int, int] = {}
    for _ in range(count):
        algorithm, bytes_each = struct.unpack("<HH", spec.take(4))
        if algorithm in sizes or _DIGEST_BYTES.get(algorithm) != bytes_each:
            text = (
                f"event log declares algorithm {algorithm:#06x} with {bytes_each} bytes"
            )
            raise EvidenceMalformedError(text)
        sizes[algorithm] = bytes_each
    if SHA384 not in sizes:
        raise EvidenceMalformedError("event log has no SHA-384 digests")
    spec.take(spec.take(1)[0])
    if spec.left():
        raise EvidenceMalformedError(f"Spec ID event has {spec.left()} bytes too many")
    return sizes


def _read_event(reader: _Reader, sizes: dict[int, int], last_register: int) -> Event:
    where = reader.offset
    register, kind, count = reader.unpack(_EVENT_HEADER)
    if register > last_register:
        text = f"event at {where} has MR index {register}, more than {last_register}"
        raise EvidenceMalformedError(text)
    if count != len(sizes):
        text = f"event at {where} has {count} digests, not {len(sizes)}"
        raise EvidenceMalformedError(text)
    digests: dict[int, bytes] = {}
    for _ in range(count):
        (algorithm,) = struct.unpack("<H", reader.take(2))
        if algorithm not in sizes or algorithm in digests:
            text = f"event at {where} has an undeclared or repeated algorithm {algorithm:#06x}"
            raise EvidenceMalformedError(text)
        digests[algorithm] = reader.take(sizes[algorithm])
    (size,) = struct.unpack("<I", reader.take(4))
    data = reader.take(size)
    return Event(rtmr=register - 1, type=kind, digest=digests[SHA384], data=data)


class _Reader:
    """Takes bytes in order and never past the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.offset = 0

    def take(self, size: int) -> bytes:
        end = self.offset + size
        if end > len(self._data):
            text = (
                f"event log needs {size} bytes at {self.offset} and has {self.left()}"
            )
            raise EvidenceMalformedError(text)
        taken = self._data[self.offset : end]
        self.offset = end
        return taken

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        return layout.unpack(self.take(layout.size))

    def left(self) -> int:
        return len(self._data) - self.offset

    def at_padding(self) -> bool:
        """Say whether only padding is left.

        Four 0xFF bytes are no MR index, and twelve 0x00 bytes no event with a digest: neither
        can begin an event, so padding that is not uniform is an error of the next read, and the
        rest is looked at as a whole at most once.
        """
        head = self._data[self.offset : self.offset + _EVENT_HEADER.size]
        if head.strip(b"\0") and head.strip(b"\xff"):
            return False
        rest = self._data[self.offset :]
        return rest in (bytes(len(rest)), b"\xff" * len(rest))
