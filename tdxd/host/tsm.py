"""Quotes from the kernel's configfs-tsm, and the firmware's event log.

Source: Linux Documentation/ABI/testing/configfs-tsm-report; drivers/virt/coco/guest/report.c and
tdx-guest.c for what each errno means.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time

from tdxd.core.eventlog import MAX_LOG_BYTES
from tdxd.core.quote import MAX_QUOTE_BYTES, REPORT_DATA_BYTES
from tdxd.errors import EvidenceUnavailableError

__all__ = ["ConfigfsTsm"]

_PROVIDER = b"tdx_guest"
_ATTRIBUTE_MAX_BYTES = 4096
_TRANSIENT = (errno.EBUSY, errno.EINTR, errno.ETIMEDOUT)
_HINTS = {
    errno.ENOENT: "a TDX guest needs Linux 6.7, configfs mounted and tdx_guest loaded",
    errno.ENXIO: "the kernel has configfs-tsm but no provider: modprobe tdx_guest, in a TDX guest",
    errno.EACCES: "only root may ask for quotes",
    errno.EPERM: "only root may ask for quotes",
    errno.EBUSY: "another program keeps the quoting interface busy",
    errno.ETIMEDOUT: "the host's quoting service does not answer; the host must run QGS",
    errno.EIO: "the hypervisor refused; the host must set quote-generation-socket",
}


class _TransientError(Exception):
    """This attempt failed in a way that another may not."""

    def __init__(self, error: EvidenceUnavailableError) -> None:
        super().__init__(str(error))
        self.error = error


class ConfigfsTsm:
    """Implements `Tsm` on a configfs-tsm report directory and a CCEL data file.

    A transient failure is tried again, `attempts` times in all, `pause_s` apart; the kernel itself
    waits 30 s before it reports ETIMEDOUT.
    """

    def __init__(
        self,
        report_dir: str,
        event_log_path: str,
        *,
        attempts: int = 4,
        pause_s: float = 0.25,
    ) -> None:
        self._report_dir = report_dir
        self._event_log_path = event_log_path
        self._attempts = attempts
        self._pause_s = pause_s

    def quote(self, report_data: bytes) -> bytes:
        """Return a quote over 64 bytes of report data; blocks while the host makes it.

        Raises: EvidenceUnavailableError; ValueError for report data of another size.
        """
        if len(report_data) != REPORT_DATA_BYTES:
            raise ValueError(f"report data is {len(report_data)} bytes long, not 64")
        for left in reversed(range(self._attempts)):
            try:
                return self._quote_once(report_data)
            except _TransientError as exc:
                if not left:
                    raise exc.error from exc
                time.sleep(self._pause_s)
        raise AssertionError("attempts is at least 1")  # pragma: no cover

    def event_log(self) -> bytes:
        """Return the CCEL data, at most 1 MiB; empty if this platform has none.

        Raises: EvidenceUnavailableError.
        """
        try:
            return _read(self._event_log_path, MAX_LOG_BYTES)
        except FileNotFoundError:
            return b""
        except OSError as exc:
            raise _unavailable("read", self._event_log_path, exc) from exc

    def _quote_once(self, report_data: bytes) -> bytes:
        # A name of our own: a second writer in one entry is what `generation` would betray.
        name = f"tdxd-{os.getpid()}-{os.urandom(8).hex()}"
        entry = os.path.join(self._report_dir, name)
        try:
            os.mkdir(entry, 0o700)
        except OSError as exc:
            raise _failed("mkdir", entry, exc) from exc
        try:
            return _exchange(entry, report_data)
        finally:
            # The entry holds nothing secret; a failed removal must not hide the cause above.
            with contextlib.suppress(OSError):
                os.rmdir(entry)


def _exchange(entry: str, report_data: bytes) -> bytes:
    provider = _attribute(entry, "provider")
    if provider != _PROVIDER:
        text = f"{entry}/provider is {provider[:32]!r}, not {_PROVIDER!r}"
        raise EvidenceUnavailableError(
            text, hint="only Intel TDX guests can be attested"
        )
    _write(os.path.join(entry, "inblob"), report_data)
    path = os.path.join(entry, "outblob")
    try:
        quote = _read(path, MAX_QUOTE_BYTES)
    except OSError as exc:
        raise _failed("read", path, exc) from exc
    generation = _attribute(entry, "generation")
    if generation != b"1":
        text = (
            f"{entry}/generation is {generation[:20]!r}, not 1: another program wrote"
        )
        raise _TransientError(EvidenceUnavailableError(text))
    if not quote:
        raise EvidenceUnavailableError(
            f"{path} is empty: the host's quoting service failed",
            hint="the host must run QGS with a provisioned platform and reach its PCCS",
        )
    return quote


def _attribute(entry: str, name: str) -> bytes:
    path = os.path.join(entry, name)
    try:
        return _read(path, _ATTRIBUTE_MAX_BYTES).rstrip(b"\n")
    except OSError as exc:
        raise _failed("read", path, exc) from exc


def _write(path: str, data: bytes) -> None:
    """Write in one call and close: configfs commits a binary attribute when it is closed."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            written = os.write(fd, data)
        finally:
            os.close(fd)
    except OSError as exc:
        raise _failed("write", path, exc) from exc
    if written != len(data):
        raise EvidenceUnavailableError(f"write {path}: {written} of {len(data)} bytes")


def _read(path: str, max_bytes: int) -> bytes:
    """Read to the end; files of configfs and sysfs do not tell their size beforehand."""
    parts: list[bytes] = []
    size = 0
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while part := os.read(fd, max_bytes + 1 - size):
            parts.append(part)
            size += len(part)
            if size > max_bytes:
                raise EvidenceUnavailableError(
                    f"{path} is longer than {max_bytes} bytes"
                )
    finally:
        os.close(fd)
    return b"".join(parts)


def _failed(op: str, path: str, exc: OSError) -> Exception:
    error = _unavailable(op, path, exc)
    return _TransientError(error) if exc.errno in _TRANSIENT else error


def _unavailable(op: str, path: str, exc: OSError) -> EvidenceUnavailableError:
    hint = _HINTS.get(exc.errno or 0, "")
    return EvidenceUnavailableError(f"{op} {path}: {exc.strerror}", hint=hint)
