"""A bundle as the key server releases it, and the lease that comes with it."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from tdxd.core.foreign import AnyBundle
from tdxd.core.named_secret import NamedSecret, ReleasedBundle
from tdxd.core.secret import Secret
from tdxd.host import clock

__all__ = ["AnyLeased", "Lease", "Leased", "LeasedSecret"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Until when something may be used, and when to ask again: seconds of CLOCK_BOOTTIME."""

    until_s: float
    renew_s: float


def _lease(lease_s: int, sent_s: float) -> Lease | None:
    """Return a lease, to be renewed at 0.4 to 0.6 of it; `None` if it is for good."""
    if not lease_s:
        return None
    share = 0.4 + 0.2 * clock.jitter()
    return Lease(until_s=sent_s + lease_s, renew_s=sent_s + lease_s * share)


B = TypeVar("B", bound=ReleasedBundle)


def _copied(bundle: B) -> B:
    return dataclasses.replace(bundle, secret=Secret(bundle.secret.reveal()))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Leased:
    """A volume's released bundle, and those of older generations that may be served, newest first.

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

    def copy(self) -> Leased:
        """Return another one, to be wiped by itself."""
        older = tuple(_copied(one) for one in self.older)
        return dataclasses.replace(self, bundle=_copied(self.bundle), older=older)

    def wipe(self) -> None:
        """Wipe all secrets."""
        for one in self.bundles:
            one.secret.wipe()

    def lease(self) -> Lease | None:
        """Return its lease, if it is not for good."""
        return _lease(self.lease_s, self.sent_s)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LeasedSecret:
    """A released named secret; `sent_s` is when the request was sent (CLOCK_BOOTTIME)."""

    bundle: NamedSecret
    lease_s: int = 0
    sent_s: float = 0.0

    def copy(self) -> LeasedSecret:
        """Return another one, to be wiped by itself."""
        return dataclasses.replace(self, bundle=_copied(self.bundle))

    def wipe(self) -> None:
        """Wipe the content."""
        self.bundle.secret.wipe()

    def lease(self) -> Lease | None:
        """Return its lease, if it is not for good."""
        return _lease(self.lease_s, self.sent_s)


AnyLeased = Leased | LeasedSecret
