"""Quotes from the kernel's configfs-tsm, and the firmware's event log.

Source: Linux Documentation/ABI/testing/configfs-tsm-report; drivers/virt/coco/guest/report.c and
tdx-guest.c for what each errno means.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from tdxd.core.quote import MAX_QUOTE_BYTES
from tdxd.errors import EvidenceUnavailableError
from tdxd.host.attempts import ATTEMPTS, PAUSE_S, TransientError, quote_by_attempts
from tdxd.host.bounded import read_bounded
from tdxd.host.event_log import read_event_log

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
    errno.EFBIG: "the quote is larger than the kernel takes: it needs a newer kernel",
    errno.EIO: "the host made no quote: it must set quote-generation-socket and run QGS",
}


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
        attempts: int = ATTEMPTS,
        pause_s: float = PAUSE_S,
    ) -> None:
        self._report_dir = report_dir
        self._event_log_path = event_log_path
        self._attempts = attempts
        self._pause_s = pause_s

    def quote(self, report_data: bytes) -> bytes:
        """Return a quote over 64 bytes of report data; blocks while the host makes it.

        Raises: EvidenceUnavailableError; ValueError for report data of another size.
        """
        return quote_by_attempts(
            self._quote_once,
            report_data,
            attempts=self._attempts,
            pause_s=self._pause_s,
        )

    def event_log(self) -> bytes:
        """Return the CCEL data, at most 1 MiB; empty if this platform has none.

        Raises: EvidenceUnavailableError.
        """
        return read_event_log(self._event_log_path)

    def has_provider(self) -> bool:
        """Say whether this kernel makes quotes of a TDX guest this way; asks for none."""
        try:
            with self._entry() as entry:
                return _attribute(entry, "provider") == _PROVIDER
        except (EvidenceUnavailableError, TransientError):
            return False

    def _quote_once(self, report_data: bytes) -> bytes:
        with self._entry() as entry:
            return _exchange(entry, report_data)

    @contextlib.contextmanager
    def _entry(self) -> Iterator[str]:
        """Make a report entry for the time of a with block."""
        # A name of our own: a second writer in one entry is what `generation` would betray.
        name = f"tdxd-{os.getpid()}-{os.urandom(8).hex()}"
        entry = os.path.join(self._report_dir, name)
        try:
            os.mkdir(entry, 0o700)
        except OSError as exc:
            raise _failed("mkdir", entry, exc) from exc
        try:
            yield entry
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
        quote = read_bounded(path, MAX_QUOTE_BYTES)
    except OSError as exc:
        if exc.errno == errno.EINVAL:  # no report data of 64 bytes: not as we wrote it
            _check_generation(entry)
        raise _failed("read", path, exc) from exc
    _check_generation(entry)
    if not quote:
        raise EvidenceUnavailableError(
            f"{path} is empty: the host's quoting service failed",
            hint="the host must run QGS with a provisioned platform and reach its PCCS",
        )
    return quote


def _check_generation(entry: str) -> None:
    """Check that exactly our own write was committed: 0 is a lost one, 2 is somebody else's."""
    generation = _attribute(entry, "generation")
    if generation != b"1":
        what = "the write was lost" if generation == b"0" else "another program wrote"
        text = f"{entry}/generation is {generation[:20]!r}, not 1: {what}"
        raise TransientError(EvidenceUnavailableError(text))


def _attribute(entry: str, name: str) -> bytes:
    path = os.path.join(entry, name)
    try:
        return read_bounded(path, _ATTRIBUTE_MAX_BYTES).rstrip(b"\n")
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


def _failed(op: str, path: str, exc: OSError) -> Exception:
    hint = _HINTS.get(exc.errno or 0, "")
    error = EvidenceUnavailableError(f"{op} {path}: {exc.strerror}", hint=hint)
    return TransientError(error) if exc.errno in _TRANSIENT else error
