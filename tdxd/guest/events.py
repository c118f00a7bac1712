"""What happened: one event per transition, to the log and to whoever watches.

Event names are past-tense dotted words. Fields are an allow-list by construction: each `emit`
names its own, and none is ever key material.
"""

from __future__ import annotations

import collections

import msgpack

from tdxd.guest.changes import Changes
from tdxd.guest.handover import HandedEvents
from tdxd.host import log
from tdxd.host.clock import wall_clock

__all__ = ["Events"]

_KEPT = 1000


class Events:
    """The last thousand events, numbered; `heard` rings for each."""

    def __init__(self) -> None:
        self._write = log.open_log()
        self._kept: collections.deque[dict[str, object]] = collections.deque(
            maxlen=_KEPT
        )
        self.count = 0
        self.by_kind: collections.Counter[tuple[str, str, str]] = collections.Counter()
        """Since this program runs, by event, volume and error code: "" is none."""
        self.heard = Changes()

    def emit(self, event: str, *, level: str = "info", **fields: object) -> None:
        """Log an event and keep it."""
        self.count += 1
        volume, code = fields.get("volume"), fields.get("code")
        self.by_kind[event, str(volume or ""), str(code or "")] += 1
        shown = {key: value for key, value in fields.items() if value not in (None, "")}
        item: dict[str, object] = {
            "seq": self.count,
            "time": wall_clock(),
            "level": level,
            "event": event,
            **shown,
        }
        self._kept.append(item)
        self._write(item)
        self.heard.ring()

    def log(self, event: str, **fields: object) -> None:
        """Log an event that nobody waits for, and do not keep it."""
        shown = {key: value for key, value in fields.items() if value not in (None, "")}
        head = {"time": wall_clock(), "level": "info", "event": event}
        self._write({**head, **shown})

    def hand_over(self) -> HandedEvents:
        """Return the count and the kept events, for the program after this one."""
        kept: bytes = msgpack.packb(list(self._kept), default=str)
        return HandedEvents(count=self.count, kept=kept)

    def adopt(self, handed: HandedEvents) -> None:
        """Go on after the events of the program before this one."""
        self._kept.extend(handed.items())
        self.count = handed.count

    def after(self, sequence: int) -> list[dict[str, object]]:
        """Return the kept events numbered above `sequence`, oldest first."""
        return [item for item in self._kept if int(str(item["seq"])) > sequence]
