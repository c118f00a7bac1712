"""RTMR3 by the kernel's measurement files: read, and extended.

Source: Linux Documentation/ABI/testing/sysfs-devices-virtual-misc-tdx_guest and
drivers/virt/coco/guest/tsm-mr.c (6.16 and later): 48 bytes written at offset 0 make the register
SHA-384(old value || bytes); any other write is EINVAL.
"""

from __future__ import annotations

import errno
import os

from tdxd.errors import EvidenceUnavailableError, HostError
from tdxd.host.bounded import read_bounded

__all__ = ["SysfsRtmr", "read_mr_config_id"]

_REGISTER = "rtmr3:sha384"
_CONFIG_ID = "mrconfigid"
_DIGEST_BYTES = 48
_NONE = (
    "Linux 6.16 and later can extend RTMR3, in a TDX guest with tdx_guest loaded; for an older one "
    'platform.extend = "never" says that quotes will not show which models are served'
)
_HINTS = {
    errno.ENOENT: _NONE,
    errno.ENOTDIR: _NONE,
    errno.EROFS: (
        "the unit's ReadWritePaths= must name the directory platform.rtmr; if it does, tdx_guest "
        "was loaded too late: restart tdxd"
    ),
    errno.EACCES: "only root may extend RTMR3",
    errno.EPERM: "only root may extend RTMR3",
    errno.EINVAL: "the kernel takes 48 bytes only: this is not the file of a TDX register",
    errno.EIO: "the TDX module refused to extend RTMR3",
}


class SysfsRtmr:
    """Implements `Rtmr` on a directory with the kernel's measurement files."""

    def __init__(self, directory: str) -> None:
        self._path = os.path.join(directory, _REGISTER)

    def value(self) -> bytes:
        """Return RTMR3, 48 bytes.

        Raises: HostError.
        """
        return _read(self._path)

    def check(self) -> None:
        """Check that it could be extended now; changes nothing.

        Raises: HostError.
        """
        try:
            os.close(os.open(self._path, os.O_WRONLY | os.O_CLOEXEC))
        except OSError as exc:
            raise _error("extend", self._path, exc) from exc

    def extend(self, digest: bytes) -> None:
        """Make it SHA-384(old value || digest), by one write of 48 bytes at offset 0.

        Raises: HostError; ValueError for a digest of another size.
        """
        if len(digest) != _DIGEST_BYTES:
            raise ValueError(f"digest is {len(digest)} bytes long, not {_DIGEST_BYTES}")
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                written = os.write(fd, digest)
            finally:
                os.close(fd)
        except OSError as exc:
            raise _error("extend", self._path, exc) from exc
        if written != _DIGEST_BYTES:
            raise HostError("extend", self._path, errno.EIO, hint=_HINTS[errno.EIO])


def read_mr_config_id(directory: str) -> bytes | None:
    """Return the TD's MRCONFIGID, 48 bytes; None where the kernel does not show it.

    Raises: HostError.
    """
    path = os.path.join(directory, _CONFIG_ID)
    return _read(path) if os.path.exists(path) else None


def _read(path: str) -> bytes:
    try:
        value = read_bounded(path, _DIGEST_BYTES)
    except OSError as exc:
        raise _error("read", path, exc) from exc
    except EvidenceUnavailableError as exc:
        raise HostError("read", path, errno.EBADMSG, hint=exc.message) from exc
    if len(value) != _DIGEST_BYTES:
        hint = (
            f"{len(value)} bytes, not {_DIGEST_BYTES}: not the file of a TDX register"
        )
        raise HostError("read", path, errno.EBADMSG, hint=hint)
    return value


def _error(op: str, path: str, exc: OSError) -> HostError:
    return HostError.of(op, path, exc, hint=_HINTS.get(exc.errno or 0, ""))
