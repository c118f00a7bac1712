"""What the parts of serving share: the host, who is told, and where failures are counted."""

from __future__ import annotations

import dataclasses
from functools import partial

import trio

from tdxd.guest.changes import Changes
from tdxd.guest.events import Events
from tdxd.guest.failures import Failures
from tdxd.guest.front import Front
from tdxd.guest.server import ModelServer
from tdxd.guest.standstill import Standstill
from tdxd.host.ports import Host

__all__ = ["ServingScene"]

_ACCESS = "access "


@dataclasses.dataclass(slots=True, kw_only=True)
class ServingScene:
    """`restarts` counts children that ended by themselves; tasks run in `nursery`."""

    host: Host
    runtime_dir: str
    standstill: Standstill
    changes: Changes
    events: Events
    failures: Failures
    nursery: trio.Nursery
    restarts: int = 0

    def read(self, child: ModelServer | Front, event: str, **fields: str) -> None:
        """Start to keep and tell what a child says."""
        self.nursery.start_soon(partial(self._read, child, event, **fields))

    async def _read(
        self, child: ModelServer | Front, event: str, **fields: str
    ) -> None:
        async for line in child.child.lines():
            if line.startswith(_ACCESS) and isinstance(child, Front):
                # Too many to keep: they would drive out what is rare.
                self.events.log("front.access", line=line.removeprefix(_ACCESS))
                continue
            child.lines.append(line)
            self.events.emit(event, level="debug", **fields, line=line)
        child.silent.set()
