"""What the parts of serving share: the host, who is told, and where failures are counted."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Protocol

import trio

from tdxd.errors import HostError, TdxdError
from tdxd.guest.changes import Changes
from tdxd.guest.events import Events
from tdxd.guest.failures import Failures
from tdxd.guest.front import Front
from tdxd.guest.handover import ServedVolume
from tdxd.guest.server import ModelServer
from tdxd.guest.standstill import Standstill
from tdxd.guest.volume_reader import VolumeReader
from tdxd.host.ports import Host

__all__ = ["OpenVolumes", "ServingScene", "failures_of_serving"]

_BACKOFF_MAX_S = 30.0
_ACCESS = "access "


class OpenVolumes(Protocol):
    """What serving asks of the volumes, and tells them."""

    @property
    def replacing(self) -> bool:
        """Whether one has gone to make room for its next generation: the servers go, too."""
        ...

    def served(self) -> tuple[ServedVolume, ...] | None:
        """Return what to serve; `None` while one is on its way and none must go."""
        ...

    def revoked(self) -> frozenset[tuple[str, int | None]]:
        """Return (id, generation) of what no child may see any longer."""
        ...

    def refuse(self, served: tuple[ServedVolume, ...], error: TdxdError) -> bool:
        """Say whether one of these is to blame that no server of them became ready: it closes."""
        ...


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
    reader: VolumeReader = dataclasses.field(default_factory=VolumeReader)

    def read(self, child: ModelServer | Front, event: str, **fields: str) -> None:
        """Start to keep and tell what a child says."""
        self.nursery.start_soon(partial(self._read, child, event, **fields))

    @contextlib.contextmanager
    def adopting(self, name: str) -> Iterator[None]:
        """Go on without a child that is none of ours any more: another one is started."""
        try:
            yield
        except HostError as exc:
            self.events.emit(
                "child.not_adopted", level="warning", child=name, error=exc.message
            )

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


def failures_of_serving(events: Events, event: str) -> Failures:
    """Return what counts failures of serving, each told as this event."""
    return Failures(
        backoff_max_s=_BACKOFF_MAX_S, slow_s=_BACKOFF_MAX_S, events=events, event=event
    )
