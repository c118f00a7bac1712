"""Which way this guest's kernel gives quotes."""

from __future__ import annotations

import os

from tdxd.core.config import PlatformConfig
from tdxd.core.qgs import parse_qgs_address
from tdxd.host.attempts import ATTEMPTS
from tdxd.host.ports import Tsm
from tdxd.host.tdx_guest import IoctlTsm
from tdxd.host.tsm import ConfigfsTsm

__all__ = ["EitherTsm", "make_tsm"]


def make_tsm(config: PlatformConfig, *, attempts: int = ATTEMPTS) -> Tsm:
    """Return what asks for quotes in the configured way, each as often as `attempts` says."""
    configfs = ConfigfsTsm(config.tsm, config.event_log, attempts=attempts)
    qgs = parse_qgs_address(config.qgs)
    ioctl = IoctlTsm(config.tdx_guest, qgs, config.event_log, attempts=attempts)
    if config.evidence == "configfs":
        return configfs
    if config.evidence == "ioctl":
        return ioctl
    return EitherTsm(configfs, ioctl, device=config.tdx_guest)


class EitherTsm:
    """Implements `Tsm`: configfs-tsm where it has a provider, else the device where there is one.

    The choice is made anew for each quote until configfs has a provider: a module may be loaded
    later. With neither, configfs says what is missing.
    """

    def __init__(self, configfs: ConfigfsTsm, ioctl: IoctlTsm, *, device: str) -> None:
        self._configfs, self._ioctl, self._device = configfs, ioctl, device
        self._has_configfs = False

    def quote(self, report_data: bytes) -> bytes:
        """Return a quote over 64 bytes of report data; blocks while the host makes it.

        Raises: as `ConfigfsTsm.quote` and `IoctlTsm.quote`.
        """
        return self.chosen().quote(report_data)

    def event_log(self) -> bytes:
        """Return the CCEL data, at most 1 MiB; empty if this platform has none.

        Raises: EvidenceUnavailableError.
        """
        return self._configfs.event_log()

    def chosen(self) -> ConfigfsTsm | IoctlTsm:
        """Return the one that would be asked now."""
        self._has_configfs = self._has_configfs or self._configfs.has_provider()
        if self._has_configfs or not os.path.exists(self._device):
            return self._configfs
        return self._ioctl
