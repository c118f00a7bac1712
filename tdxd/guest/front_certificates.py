"""Which certificates the front should have now, and what keeps it from having them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from tdxd.core.config import Config
from tdxd.core.plan import Failure
from tdxd.errors import (
    DataError,
    HostError,
    ServerExitedError,
    TdxdError,
    VolumeError,
)
from tdxd.guest.certificates import (
    Certificates,
    CertificateSources,
    NoSecrets,
    Secrets,
    certificates_key,
    volume_is_there,
)
from tdxd.guest.events import Events
from tdxd.guest.handover import ServedVolume
from tdxd.guest.serving_scene import failures_of_serving

__all__ = ["FrontCertificates"]


class FrontCertificates:
    """The certificates by the configuration and the volumes of now.

    A failure is about one set of them: others are tried at once. Those that a front has taken are
    kept, for one that must start while others cannot be used.
    """

    def __init__(
        self,
        secrets: Secrets | None,
        events: Events,
        now: Callable[[], tuple[Config, tuple[ServedVolume, ...]]],
        revoked: Callable[[], frozenset[tuple[str, int | None]]],
    ) -> None:
        self.proven: Certificates | None = None
        self._sources = CertificateSources(secrets or NoSecrets())
        self._now, self._revoked = now, revoked
        self._failed_key: str | None = None
        self._failures = failures_of_serving(events, "front.certificates_refused")

    @property
    def key(self) -> str | None:
        """A key that differs when the front needs others; `None` while there are none."""
        return self._sources.key(*self._now())

    @property
    def supplied(self) -> bool:
        """Whether the volume is there that they are from, if they are to be from one."""
        return volume_is_there(*self._now())

    @property
    def failure(self) -> Failure | None:
        """What kept a front from taking those that it needs now."""
        return self._failures.last if self.key == self._failed_key else None

    def revoked(self, sources: tuple[str, ...]) -> bool:
        """Say whether something of these must not be used any longer."""
        return self._sources.revoked(self._now()[0], sources, self._revoked())

    async def read(self) -> Certificates:
        """Return them.

        Raises: NotReadyError if what supplies them is not there; MissingError, StalledError,
        HostError.
        """
        return await self._sources.read(*self._now())

    async def start(self, start: Callable[[Certificates], Awaitable[None]]) -> None:
        """Start a front with those of now; else, if they cannot be used, with proven ones.

        Raises: NotReadyError, MissingError, StalledError, HostError, DataError; what `start` does.
        """
        key = self.key
        try:
            made = await self.read()
            made.check()
        except (DataError, VolumeError, HostError) as exc:
            await start(self._instead(key, exc))
            return
        try:
            await start(made)
        except ServerExitedError as exc:
            await start(self._instead(key, exc))
            return
        self.proven = made
        self.forget()

    def _instead(self, key: str | None, error: TdxdError) -> Certificates:
        """Return the proven ones, for a front that cannot have those of this key.

        Raises: the error itself, if there are none that may be used.
        """
        proven = self.proven
        if proven is None or not self.supplied or self.revoked(proven.sources):
            raise error
        if certificates_key(proven.sources) == key:
            raise error
        self._add(key, error)
        return proven

    def forget_proven(self, *, ends: bool) -> None:
        """Keep no key of what is closed, or must be, or where nothing is served any more."""
        proven = self.proven
        if proven and (ends or not self.supplied or self.revoked(proven.sources)):
            self.proven = None

    def failed(self, error: TdxdError) -> None:
        """Count a failure with those of now."""
        self._add(self.key, error)

    def _add(self, key: str | None, error: TdxdError) -> None:
        if key != self._failed_key:
            self._failures.forget()
        self._failed_key = key
        self._failures.add(error)

    def forget(self) -> None:
        """Forget the last failure."""
        self._failures.forget()
