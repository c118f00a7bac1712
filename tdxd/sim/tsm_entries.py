"""What configfs-tsm does with a report entry, apart from being a file system.

Source: Linux drivers/virt/coco/guest/report.c (generations, one report at a time) and tdx-guest.c
(64 bytes exactly, EBUSY, ETIMEDOUT, an empty blob when the quoting service fails).
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable

from tdxd.sim.platform import SimPlatform

__all__ = [
    "OVERSIZE_BYTES",
    "PROVIDER",
    "Quoter",
    "ReportEntries",
    "ReportEntry",
    "os_error",
]

PROVIDER = b"tdx_guest\n"
OVERSIZE_BYTES = 20000
"""A quote of this size fits the kernel's buffer, and nobody who reads quotes takes it."""
_ERRNOS = {
    "timeout": errno.ETIMEDOUT,
    "error": errno.EIO,
    "too-large": errno.EFBIG,
}
_INBLOB_BYTES = 64
_MAX_ENTRIES = 1024


def os_error(number: int) -> OSError:
    """Return the exception for one errno."""
    return OSError(number, os.strerror(number))


class Quoter:
    """Makes one quote at a time, with the faults that the platform's description asks for."""

    def __init__(
        self, platform: SimPlatform, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._platform = platform
        self._faults = platform.description.faults
        self._sleep = sleep
        self._in_flight = threading.Lock()
        self._asked = 0

    @property
    def has_provider(self) -> bool:
        """Say whether the kernel has a provider of quotes at all."""
        return self._faults.quote != "no-provider"

    def quote(self, inblob: bytes | None) -> bytes:
        """Return a quote over `inblob`; empty if the quoting service fails.

        Raises: OSError: EINVAL, EBUSY while another is in flight, ETIMEDOUT, EIO, EFBIG.
        """
        if inblob is None or len(inblob) != _INBLOB_BYTES:
            raise os_error(errno.EINVAL)
        if not self._in_flight.acquire(blocking=False):
            raise os_error(errno.EBUSY)
        try:
            self._asked += 1
            self._sleep(self._faults.delay_s)
            return self._answer(inblob)
        finally:
            self._in_flight.release()

    def _answer(self, inblob: bytes) -> bytes:
        over = 0 < self._faults.count < self._asked
        fault = "none" if over else self._faults.quote
        if fault in _ERRNOS:
            raise os_error(_ERRNOS[fault])
        if fault == "empty":
            return b""
        quote = self._platform.quote(inblob)
        return quote.ljust(OVERSIZE_BYTES, b"\0") if fault == "oversize" else quote


class ReportEntry:
    """One directory below `report`."""

    def __init__(self, quoter: Quoter) -> None:
        self._quoter = quoter
        self._lock = threading.Lock()
        self._inblob: bytes | None = None
        self._written = 0
        self._quote: tuple[int, bytes] | None = None

    def commit(self, inblob: bytes) -> None:
        """Take new report data: what the kernel does when a writer closes the file."""
        with self._lock:
            self._inblob = inblob
            self._written += 1

    def generation(self) -> bytes:
        """Return the number of commits so far, as text."""
        with self._lock:
            return b"%d\n" % self._written

    def outblob(self) -> bytes:
        """Return the quote, made once per generation.

        Raises: OSError, as `Quoter.quote`.
        """
        with self._lock:
            written, inblob, cached = self._written, self._inblob, self._quote
        if cached is not None and cached[0] == written:
            return cached[1]
        quote = self._quoter.quote(inblob)
        with self._lock:
            self._quote = (written, quote)
        return quote


class ReportEntries:
    """The directory `report`."""

    def __init__(self, quoter: Quoter) -> None:
        self._quoter = quoter
        self._entries: dict[str, ReportEntry] = {}

    def names(self) -> list[str]:
        """Return the names of the entries."""
        return list(self._entries)

    def get(self, name: str) -> ReportEntry | None:
        """Return one entry, or None."""
        return self._entries.get(name)

    def make(self, name: str) -> None:
        """Make an entry.

        Raises: OSError: ENXIO without a provider, EEXIST, ENOSPC beyond 1024.
        """
        if not self._quoter.has_provider:
            raise os_error(errno.ENXIO)
        if len(self._entries) >= _MAX_ENTRIES:
            raise os_error(errno.ENOSPC)
        if self._entries.setdefault(name, entry := ReportEntry(self._quoter)) != entry:
            raise os_error(errno.EEXIST)

    def remove(self, name: str) -> None:
        """Remove an entry.

        Raises: OSError: ENOENT.
        """
        if self._entries.pop(name, None) is None:
            raise os_error(errno.ENOENT)
