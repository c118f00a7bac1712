"""The tree of files that a TDX guest's kernel shows: report entries, measurements, event log.

Source: Linux Documentation/ABI/testing/configfs-tsm-report,
sysfs-devices-virtual-misc-tdx_guest (6.16), drivers/virt/coco/guest/tsm-mr.c.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
from collections.abc import Callable

from tdxd.sim.platform import SimPlatform
from tdxd.sim.tsm_entries import PROVIDER, Quoter, ReportEntries, ReportEntry, os_error

__all__ = ["Handle", "TsmFile", "TsmTree"]

_INBLOB_MAX_BYTES = 64
_DIGEST_BYTES = 48


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TsmFile:
    """One file: `read` returns the whole content, `store` takes what was written.

    `store_at_close`: what was written, at most `max_bytes`, is stored when the writer closes
    (configfs); otherwise each write is stored at once (sysfs).
    """

    mode: int
    size_bytes: int = 0
    read: Callable[[], bytes] | None = None
    store: Callable[[bytes], None] | None = None
    store_at_close: bool = False
    max_bytes: int = 4096

    def open(self, flags: int) -> Handle:
        """Return a handle.

        Raises: OSError: EACCES where the file has no such direction, as also root gets it.
        """
        access = flags & os.O_ACCMODE
        if access != os.O_WRONLY and self.read is None:
            raise os_error(errno.EACCES)
        if access != os.O_RDONLY and self.store is None:
            raise os_error(errno.EACCES)
        return Handle(self)


class Handle:
    """An open file: the content is made at the first read, as configfs does."""

    def __init__(self, file: TsmFile) -> None:
        self._file = file
        self._content: bytes | None = None
        self._buffer: bytearray | None = None

    def read(self, size: int, offset: int) -> bytes:
        """Return at most `size` bytes from `offset`."""
        assert self._file.read is not None
        if self._content is None:
            self._content = self._file.read()
        return self._content[offset : offset + size]

    def write(self, data: bytes, offset: int) -> int:
        """Store at once, or keep for `flush`.

        Raises: OSError: EFBIG beyond the file's limit, EINVAL for a measurement of wrong size.
        """
        assert self._file.store is not None
        if not self._file.store_at_close:
            if offset:
                raise os_error(errno.EINVAL)
            self._file.store(data)
            return len(data)
        end = offset + len(data)
        if end > self._file.max_bytes:
            raise os_error(errno.EFBIG)
        buffer = self._buffer if self._buffer is not None else bytearray()
        buffer.extend(bytes(max(0, end - len(buffer))))
        buffer[offset:end] = data
        self._buffer = buffer
        return len(data)

    def flush(self) -> None:
        """Commit what was written since the last flush: runs inside the writer's close()."""
        buffer, self._buffer = self._buffer, None
        if buffer is not None and self._file.store is not None:
            self._file.store(bytes(buffer))


class TsmTree:
    """Finds files and directories by their path below the mount point."""

    def __init__(self, platform: SimPlatform, quoter: Quoter) -> None:
        self._platform = platform
        self.reports = ReportEntries(quoter)
        self._measurements = _measurement_files(platform)

    def entry_name(self, path: str) -> str:
        """Return the name of the report entry that `path` would be.

        Raises: OSError: EPERM for a path anywhere else.
        """
        parts = path.strip("/").split("/")
        if len(parts) != 2 or parts[0] != "report":
            raise os_error(errno.EPERM)
        return parts[1]

    def directory(self, path: str) -> list[str] | None:
        """Return the names in a directory; None if it is not one."""
        parts = path.strip("/").split("/")
        if parts == [""]:
            event_log = ["CCEL"] if self._platform.event_log else []
            return ["report", "measurements", *event_log]
        if parts == ["report"]:
            return self.reports.names()
        if parts == ["measurements"]:
            return list(self._measurements)
        if parts[0] == "report" and len(parts) == 2:
            entry = self.reports.get(parts[1])
            return list(_entry_files(entry)) if entry else None
        return None

    def file(self, path: str) -> TsmFile | None:
        """Return a file; None if there is none."""
        parts = path.strip("/").split("/")
        if parts == ["CCEL"] and self._platform.event_log:
            log = self._platform.event_log
            return TsmFile(mode=0o400, size_bytes=len(log), read=lambda: log)
        if parts[0] == "measurements" and len(parts) == 2:
            return self._measurements.get(parts[1])
        if parts[0] == "report" and len(parts) == 3:
            entry = self.reports.get(parts[1])
            return _entry_files(entry).get(parts[2]) if entry else None
        return None


def _entry_files(entry: ReportEntry) -> dict[str, TsmFile]:
    """Return the four attributes that the TDX provider shows; others it hides."""
    return {
        "inblob": TsmFile(
            mode=0o200,
            store=entry.commit,
            store_at_close=True,
            max_bytes=_INBLOB_MAX_BYTES,
        ),
        "outblob": TsmFile(mode=0o400, read=entry.outblob),
        "generation": TsmFile(mode=0o444, size_bytes=4096, read=entry.generation),
        "provider": TsmFile(mode=0o444, size_bytes=4096, read=lambda: PROVIDER),
    }


def _measurement_files(platform: SimPlatform) -> dict[str, TsmFile]:
    report = platform.report()
    fixed = {
        "mrtd:sha384": report.mr_td,
        "mrconfigid": report.mr_config_id,
        "mrowner": report.mr_owner,
        "mrownerconfig": report.mr_owner_config,
    }
    files = {
        name: TsmFile(
            mode=0o444, size_bytes=_DIGEST_BYTES, read=functools.partial(bytes, value)
        )
        for name, value in fixed.items()
    }
    for index in range(4):
        writable = index >= 2
        files[f"rtmr{index}:sha384"] = TsmFile(
            mode=0o644 if writable else 0o444,
            size_bytes=_DIGEST_BYTES,
            read=functools.partial(_rtmr, platform, index),
            store=functools.partial(_extend, platform, index) if writable else None,
        )
    return files


def _rtmr(platform: SimPlatform, index: int) -> bytes:
    return platform.rtmrs[index]


def _extend(platform: SimPlatform, index: int, digest: bytes) -> None:
    if len(digest) != _DIGEST_BYTES:
        raise os_error(errno.EINVAL)
    platform.extend_rtmr(index, digest)
