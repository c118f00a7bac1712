"""The lease of one open volume: until when it may be open, and another one in time.

A release may hold for a time only, so that a revocation reaches a guest that already serves.
The deadline is one of CLOCK_BOOTTIME, which the host cannot set, and runs from the moment when
the request was sent: no delay on the way makes it longer. At about half of it the volume is
released once more; that key is wiped at once, only its lease counts.
"""

from __future__ import annotations

import trio

from tdxd.core.foreign import AnyManifest
from tdxd.core.plan import Failure, LeaseSeen
from tdxd.errors import DeniedError, KeyReleaseError, Retry, TdxdError
from tdxd.guest.leased import Lease, Leased
from tdxd.guest.surroundings import Surroundings

__all__ = ["VolumeLease"]


class VolumeLease:
    """Without a lease the volume may stay open for good: so it is while nothing is open, too."""

    def __init__(self, volume_id: str, around: Surroundings) -> None:
        self._volume_id = volume_id
        self._boottime_s = around.host.boottime_s
        self._attester = around.attester
        self._changes, self._events = around.changes, around.events
        self._lease: Lease | None = None
        self._expired = False
        """Whether it is known to be over: it is closed then, and no renewal comes in time."""
        self.superseded = False
        """Whether it was last refused because only another generation may be served now."""
        self._work: trio.CancelScope | None = None
        self._failures = around.failures("lease.not_renewed", volume_id)

    # --- what others see ---

    def seen(self, now_s: float) -> LeaseSeen | None:
        """Return the lease on the plan's clock, whose time is `now_s`."""
        lease, failure = self._lease, self._failures.last
        if lease is None:
            return None
        ahead_s = now_s - self._boottime_s()
        renew_s = lease.renew_s + ahead_s
        if failure is not None:
            renew_s = max(renew_s, failure.until_s)
        renewing = self._work is not None
        return LeaseSeen(
            until_s=lease.until_s + ahead_s, renew_s=None if renewing else renew_s
        )

    @property
    def left_s(self) -> float | None:
        """How long the volume may still be open; `None`: for good."""
        if self._lease is None:
            return None
        return max(0.0, self._lease.until_s - self._boottime_s())

    @property
    def failure(self) -> Failure | None:
        """Why it could not be renewed the last time."""
        return self._failures.last

    def newly_expired(self) -> TdxdError | None:
        """Return why the volume must close, once, when the lease is over; else `None`."""
        if self._lease is None or self._expired or self.left_s:
            return None
        self._expired = True
        self.give_up()
        self._events.emit("lease.expired", level="warning", volume=self._volume_id)
        text, failure = f"lease of volume {self._volume_id!r} ran out", self.failure
        if failure is None:
            return KeyReleaseError(f"{text} before it was renewed")
        error = failure.error
        if error.retry is Retry.SLOW:
            text = f"{text}, its renewal was refused: {error.message}"
            return DeniedError(text, hint=error.hint)
        text = f"{text}, it could not be renewed: {error.message}"
        return KeyReleaseError(text, hint=error.hint)

    # --- its life ---

    def begin(self, leased: Leased) -> None:
        """Let it run from a release on."""
        self._lease, self._expired = leased.lease(), False
        self.superseded = False
        self._failures.forget()

    def end(self) -> None:
        """Forget it: nothing is open any more."""
        self.give_up()
        self._lease, self._expired, self.superseded = None, False, False
        self._failures.forget()

    def give_up(self) -> None:
        """Call a renewal under way off."""
        if self._work is not None:
            self._work.cancel()

    def retry_now(self) -> None:
        """Ask again at once after a failure."""
        self._failures.forget()

    def network_came_up(self) -> None:
        """Ask again at once after a failure that a network mends."""
        if self.failure is not None and self.failure.error.retry is Retry.BACKOFF:
            self._failures.forget()

    def start_renewal(self, nursery: trio.Nursery, manifest: AnyManifest) -> None:
        """Begin to ask for another lease of what is open; a failure is tried again in time."""
        if self._lease is not None and self._work is None:
            self._work = trio.CancelScope()
            nursery.start_soon(self._renew, self._lease, manifest, self._work)

    async def _renew(
        self, lease: Lease, manifest: AnyManifest, work: trio.CancelScope
    ) -> None:
        with work:
            try:
                leased = await self._attester.bundle(self._volume_id)
                leased.wipe()
                self._same(leased, manifest)
            except TdxdError as exc:
                if self._lease is lease:
                    self._failures.add(exc, left_s=self.left_s or 0.0)
            else:
                self._renewed(lease, leased)
        self._work = None
        self._changes.ring()

    def _renewed(self, lease: Lease, leased: Leased) -> None:
        """Go on with the new lease, unless the old one is over or of another time."""
        if self._lease is not lease or self._expired or not self.left_s:
            return
        self.begin(leased)
        self._events.emit(
            "lease.renewed", volume=self._volume_id, lease_s=leased.lease_s
        )

    def _same(self, leased: Leased, manifest: AnyManifest) -> None:
        """Check that what is open is among what may be served.

        Raises: KeyReleaseError.
        """
        released = [one.manifest for one in leased.bundles]
        if manifest not in released:
            found, have = [one.generation for one in released], manifest.generation
            what = "another manifest"
            if have not in found:
                self.superseded = True
                what = f"generation {', '.join(str(one) for one in found)}"
            text = f"key server releases {what} of volume {self._volume_id!r} now"
            hint = "its lease is not one of what is open, which closes when its own runs out"
            raise KeyReleaseError(f"{text}; generation {have} is open", hint=hint)

    # --- over an exec ---

    def hand_over(self) -> Lease | None:
        """Return what the program after this one needs: CLOCK_BOOTTIME is the same there."""
        return self._lease

    def adopt(self, handed: Lease | None) -> None:
        """Go on with the lease of the program before this one."""
        self._lease = handed
