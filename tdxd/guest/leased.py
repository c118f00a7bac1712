"""A bundle as the key server releases it, and the lease that comes with it."""

from __future__ import annotations

import dataclasses

from tdxd.core.foreign import AnyBundle
from tdxd.host import clock

__all__ = ["Lease", "Leased"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Until when a volume may be open, and when to ask again: seconds of CLOCK_BOOTTIME."""

    until_s: float
    renew_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Leased:
    """A released bundle, and those of older generations that may be served, too, newest first.

    `sent_s` is when the request was sent (CLOCK_BOOTTIME).
    """

    bundle: AnyBundle
    lease_s: int = 0
    sent_s: float = 0.0
    older: tuple[AnyBundle, ...] = ()

    @property
    def bundles(self) -> tuple[AnyBundle, ...]:
        """All of them, the newest first."""
        return (self.bundle, *self.older)

    def wipe(self) -> None:
        """Wipe all secrets."""
        for one in self.bundles:
            one.secret.wipe()

    def lease(self) -> Lease | None:
        """Return its lease, to be renewed at 0.4 to 0.6 of it; `None` if it is for good."""
        if not self.lease_s:
            return None
        share = 0.4 + 0.2 * clock.jitter()
        return Lease(
            until_s=self.sent_s + self.lease_s,
            renew_s=self.sent_s + self.lease_s * share,
        )
