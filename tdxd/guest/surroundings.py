"""What all volumes of one daemon share."""

from __future__ import annotations

import dataclasses

import trio

from tdxd.core.config import KeyReleaseConfig
from tdxd.guest.attest import Attester
from tdxd.guest.changes import Changes
from tdxd.guest.events import Events
from tdxd.guest.failures import Failures
from tdxd.guest.runtime_record import RuntimeRecord
from tdxd.guest.standstill import Standstill
from tdxd.host.ports import Host

__all__ = ["Surroundings"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """`directory` holds the mount points; tasks of a volume run in `nursery`."""

    host: Host
    release: KeyReleaseConfig
    attester: Attester
    record: RuntimeRecord
    standstill: Standstill
    changes: Changes
    events: Events
    nursery: trio.Nursery
    directory: str

    def failures(self, event: str, volume_id: str) -> Failures:
        """Return a count of failures that are told as this event of a volume."""
        return Failures(
            backoff_max_s=self.release.backoff_max_s,
            slow_s=self.release.denied_retry_s,
            events=self.events,
            event=event,
            volume=volume_id,
        )
