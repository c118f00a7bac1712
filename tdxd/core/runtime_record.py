"""What this boot added to RTMR3, as the guest keeps it: where it began, and each event since.

An event is kept before RTMR3 is extended with it. So after a crash between the two the register
is one event behind, and the last event is the one to extend it with.
"""

from __future__ import annotations

import dataclasses

from tdxd.core.decode import decode, encode_canonical, strict_map
from tdxd.core.runtime_log import (
    MAX_RUNTIME_EVENTS,
    MAX_RUNTIME_LOG_BYTES,
    RuntimeEvent,
    encode_runtime_log,
    parse_runtime_log,
    replay_runtime,
)
from tdxd.errors import RecordError, TdxdError

__all__ = ["RuntimeHistory", "parse_history"]

_REGISTER_BYTES = 48
_MAX_BYTES = MAX_RUNTIME_LOG_BYTES + 4096
_SOURCE = "runtime log"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Fields:
    """The kept form: canonical msgpack; `log` as requests carry it."""

    boot_id: str
    base: bytes
    log: bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeHistory:
    """RTMR3 was `base` (48 bytes) when it was first used in this boot; then came the events."""

    boot_id: str
    base: bytes
    events: tuple[RuntimeEvent, ...] = ()

    def __post_init__(self) -> None:
        if len(self.base) != _REGISTER_BYTES:
            msg = f"base is {len(self.base)} bytes long, not {_REGISTER_BYTES}"
            raise ValueError(msg)

    @property
    def log(self) -> bytes:
        """The log as a request carries it."""
        return encode_runtime_log(self.events)

    @property
    def value(self) -> bytes:
        """What RTMR3 must be: the replay of all events."""
        return replay_runtime(self.base, self.events)

    def missing(self, register: bytes) -> RuntimeEvent | None:
        """Return the event that RTMR3 lacks, `None` if it has all.

        Raises: RecordError if neither explains the register.
        """
        if register == self.value:
            return None
        if self.events and register == self.without_last().value:
            return self.events[-1]
        text = (
            f"RTMR3 is {register.hex()}, but the {len(self.events)} events of the runtime log "
            f"lead to {self.value.hex()}"
        )
        hint = (
            "another program extended RTMR3, or the log is of another TD: "
            "only a reboot brings them together"
        )
        raise RecordError(text, hint=hint)

    def with_event(self, event: RuntimeEvent) -> RuntimeHistory:
        """Return the history with one event more.

        Raises: RecordError if no request could carry it.
        """
        longer = dataclasses.replace(self, events=(*self.events, event))
        size = len(longer.log)
        if len(longer.events) > MAX_RUNTIME_EVENTS or size > MAX_RUNTIME_LOG_BYTES:
            text = f"runtime log is full: {len(longer.events)} events, {size} bytes"
            raise RecordError(text, hint="it begins anew with the next boot: reboot")
        return longer

    def without_last(self) -> RuntimeHistory:
        """Return the history without its last event."""
        return dataclasses.replace(self, events=self.events[:-1])

    def encode(self) -> bytes:
        """Encode what `parse_history` reads."""
        fields = {"boot_id": self.boot_id, "base": self.base, "log": self.log}
        return encode_canonical(fields)


def parse_history(data: bytes) -> RuntimeHistory:
    """Read what `encode` wrote.

    Raises: RecordError.
    """
    try:
        value = strict_map(data, source=_SOURCE, max_bytes=_MAX_BYTES)
        fields = decode(_Fields, value, source=_SOURCE, error=RecordError)
        events = parse_runtime_log(fields.log)
        return RuntimeHistory(boot_id=fields.boot_id, base=fields.base, events=events)
    except (TdxdError, ValueError) as exc:
        text = str(exc) if str(exc).startswith(_SOURCE) else f"{_SOURCE}: {exc}"
        hint = "somebody wrote to the file; it begins anew with the next boot: reboot"
        raise RecordError(text, hint=hint) from exc
