"""The runtime log: what a running guest extended RTMR3 with, in order.

Firmware's log ends at boot. A guest that extends RTMR3 later keeps this list and sends it with
each request, where report data binds it; it is believed only as far as it replays to the quote.
RTMR3 attests history: code that was compromised after an extension can still ask again.

The digest of an event covers its type, name and payload alike, so that its meaning is proved
by the replay. The rule puts no length before the name: a name with a colon could move bytes
between name and payload under one digest, and is refused.

Source: dstack, cc-eventlog/src/runtime_events.rs (digest and event type).
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import struct
from collections.abc import Iterable, Sequence

from tdxd.core.decode import decode, encode_canonical, plain, strict_map
from tdxd.core.eventlog import extend
from tdxd.core.foreign import AnyManifest
from tdxd.core.volume_id import check_volume_id
from tdxd.errors import EvidenceMalformedError

__all__ = [
    "MAX_RUNTIME_EVENTS",
    "MAX_RUNTIME_LOG_BYTES",
    "RUNTIME_EVENT_TYPE",
    "VOLUME_EVENT",
    "RuntimeEvent",
    "VolumeServed",
    "encode_runtime_log",
    "parse_runtime_log",
    "read_volume_event",
    "replay_runtime",
    "volume_event",
]

MAX_RUNTIME_LOG_BYTES = 256 << 10
MAX_RUNTIME_EVENTS = 4096
RUNTIME_EVENT_TYPE = 0x08000001
"""dstack's event type for what a guest extends by itself."""
VOLUME_EVENT = "tdxd/volume"
"""Name of the event that precedes the serving of a volume."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_MAX_VOLUME_PAYLOAD_BYTES = 256


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeEvent:
    """One extension of RTMR3; `payload` may be any bytes.

    Raises: ValueError for a name that is not 1 to 128 of `[A-Za-z0-9._/-]`.
    """

    name: str
    payload: bytes

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            text = f"runtime event name {self.name!r:.160} is not 1 to 128 of A-Z a-z 0-9 . _ / -"
            raise ValueError(text)

    def digest(self) -> bytes:
        """Return what RTMR3 is extended with, 48 bytes.

        SHA-384(le32(type) ‖ ":" ‖ name ‖ ":" ‖ payload).
        """
        head = struct.pack("<I", RUNTIME_EVENT_TYPE) + b":" + self.name.encode() + b":"
        return hashlib.sha384(head + self.payload).digest()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VolumeServed:
    """What a `tdxd/volume` event says; `manifest_sha256` is 32 bytes.

    The hash stands for the manifest without telling its secret salt.
    """

    volume_id: str
    generation: int
    manifest_sha256: bytes

    def __post_init__(self) -> None:
        check_volume_id(self.volume_id)
        if not 1 <= self.generation < 2**63:
            raise ValueError(f"generation {self.generation} is not 1 to 2^63 - 1")
        if len(self.manifest_sha256) != hashlib.sha256().digest_size:
            size = len(self.manifest_sha256)
            raise ValueError(f"manifest_sha256 is {size} bytes, not 32")


def encode_runtime_log(events: Sequence[RuntimeEvent]) -> bytes:
    """Write canonical msgpack, a list of [name, payload]; nothing at all for no events."""
    pairs = [[event.name, event.payload] for event in events]
    return encode_canonical(pairs) if pairs else b""


def parse_runtime_log(data: bytes) -> tuple[RuntimeEvent, ...]:
    """Read what `encode_runtime_log` writes, of which there is one form only.

    Raises: EvidenceMalformedError for anything else, or beyond the caps of this module.
    """
    if not data:
        return ()
    pairs = strict_map(
        data,
        source="runtime log",
        max_bytes=MAX_RUNTIME_LOG_BYTES,
        error=EvidenceMalformedError,
    )
    if not isinstance(pairs, list) or not 1 <= len(pairs) <= MAX_RUNTIME_EVENTS:
        text = f"runtime log is not a list of 1 to {MAX_RUNTIME_EVENTS} events"
        raise EvidenceMalformedError(text)
    events = tuple(_read_event(index, pair) for index, pair in enumerate(pairs))
    if encode_runtime_log(events) != data:
        raise EvidenceMalformedError("runtime log is not canonical msgpack")
    return events


def replay_runtime(base: bytes, events: Iterable[RuntimeEvent]) -> bytes:
    """Return RTMR3 after the events, starting from `base`, both 48 bytes."""
    register = base
    for event in events:
        register = extend(register, event.digest())
    return register


def volume_event(manifest: AnyManifest) -> RuntimeEvent:
    """Return the event that says which volume is about to be served."""
    served = VolumeServed(
        volume_id=manifest.volume_id,
        generation=manifest.generation,
        manifest_sha256=manifest.digest(),
    )
    return RuntimeEvent(name=VOLUME_EVENT, payload=encode_canonical(plain(served)))


def read_volume_event(event: RuntimeEvent) -> VolumeServed | None:
    """Read a `tdxd/volume` event; None for one of another name.

    Raises: EvidenceMalformedError where the payload of such an event is not what
    `volume_event` writes.
    """
    if event.name != VOLUME_EVENT:
        return None
    source = f"runtime event {VOLUME_EVENT}"
    value = strict_map(
        event.payload,
        source=source,
        max_bytes=_MAX_VOLUME_PAYLOAD_BYTES,
        error=EvidenceMalformedError,
    )
    served = decode(VolumeServed, value, source=source, error=EvidenceMalformedError)
    if encode_canonical(plain(served)) != event.payload:
        raise EvidenceMalformedError(f"{source}: payload is not canonical msgpack")
    return served


def _read_event(index: int, pair: object) -> RuntimeEvent:
    match pair:
        case [str(name), bytes(payload)]:
            try:
                return RuntimeEvent(name=name, payload=payload)
            except ValueError as exc:
                raise EvidenceMalformedError(f"runtime log: {index}: {exc}") from exc
        case _:
            text = f"runtime log: {index}: not a name and a payload"
            raise EvidenceMalformedError(text)
