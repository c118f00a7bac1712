"""Where the key of a volume comes from: the key server, or an operator."""

from __future__ import annotations

import dataclasses

import trio

from tdxd.core.config import VolumeConfig
from tdxd.errors import PassphraseNeededError
from tdxd.guest import opening
from tdxd.guest.lease import VolumeLease
from tdxd.guest.leased import Leased
from tdxd.guest.surroundings import Surroundings
from tdxd.guest.volume_device import VolumeDevice

__all__ = ["VolumeKeys"]


class VolumeKeys:
    """Gets the keys for one device, which wipes them."""

    def __init__(
        self,
        spec: VolumeConfig,
        around: Surroundings,
        device: VolumeDevice,
        lease: VolumeLease,
    ) -> None:
        self._spec, self._device, self._lease = spec, device, lease
        self._mapper = around.host.mapper
        self._attester, self._record = around.attester, around.record
        self._work: trio.CancelScope | None = None

    def give_up(self) -> None:
        """Call an exchange under way off."""
        if self._work is not None:
            self._work.cancel()

    async def attest(self, *, newer_than: int | None) -> bool:
        """Get the keys, unless it is known beforehand that the volume could not serve then.

        Of what is not newer than `newer_than` none is kept; returns whether there is news.

        Raises: KeyReleaseError, EvidenceError, ConfigError, BadBundleError, HostError.
        """
        opening.check_mapper(self._spec, self._mapper)
        try:
            with trio.CancelScope() as self._work:
                await self._record.check()
                leased = _newer(await self._attester.bundle(self._spec.id), newer_than)
                if leased is None:
                    return False
                self._device.take(leased.bundles)
                self._lease.begin(leased)
        finally:
            self._work = None
        return True

    async def ask_operator(self) -> None:
        """Fail, for only an operator can help, unless one has come while RTMR3 was looked at.

        Raises: PassphraseNeededError, ConfigError, HostError.
        """
        spec = self._spec
        opening.check_mapper(spec, self._mapper)
        await self._record.check()
        if not self._device.bundles:
            text = f"volume {spec.id}: its passphrase must come from an operator"
            raise PassphraseNeededError(text, hint=opening.operator_hint(spec))


def _newer(leased: Leased, than: int | None) -> Leased | None:
    """Return what of it is newer, `None` if nothing is; the rest is wiped."""
    if than is None:
        return leased
    for one in leased.bundles:
        if one.manifest.generation <= than:
            one.secret.wipe()
    newer = [one for one in leased.bundles if one.manifest.generation > than]
    if not newer:
        return None
    return dataclasses.replace(leased, bundle=newer[0], older=tuple(newer[1:]))
