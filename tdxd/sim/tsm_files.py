"""The tree of files that a TDX guest's kernel shows: report entries, measurements, event log.

With them stands the device `tdx_guest`, whose one ioctl makes TD reports.

Source: Linux Documentation/ABI/testing/configfs-tsm-report,
sysfs-devices-virtual-misc-tdx_guest (6.16), drivers/virt/coco/guest/tsm-mr.c.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
from collections.abc import Callable

from tdxd.core.quote import REPORT_DATA_BYTES
from tdxd.core.td_report import TDX_CMD_GET_REPORT0
from tdxd.sim.platform import SimPlatform
from tdxd.sim.tsm_entries import PROVIDER, Quoter, ReportEntries, ReportEntry, os_error

__all__ = ["Handle", "TsmFile", "TsmTree"]

_INBLOB_MAX_BYTES = 64
_DIGEST_BYTES = 48


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TsmFile:
    """One file: `read` returns the whole content, `store` takes what was written.

    `store_at_close`: what was written, at most `max_bytes`, is stored when the writer closes
    (configfs); otherwise each write is stored at once, cut at `size_bytes` (sysfs).
    """

    mode: int
    size_bytes: int = 0
    read: Callable[[], bytes] | None = None
    store: Callable[[bytes], None] | None = None
    store_at_close: bool = False
    live: bool = False
    """Each read makes the content anew."""
    ioctl: Callable[[int, bytes], bytes] | None = None
    """A device: takes a command and its argument, returns the argument as it stands after."""
    max_bytes: int = 4096

    def open(self, flags: int) -> Handle:
        """Return a handle.

        Raises: OSError: EACCES where the file has no such direction, as also root gets it.
        """
        access = flags & os.O_ACCMODE
        if self.ioctl is not None:
            return Handle(self)
        if access != os.O_WRONLY and self.read is None:
            raise os_error(errno.EACCES)
        if access != os.O_RDONLY and self.store is None:
            raise os_error(errno.EACCES)
        return Handle(self)


class Handle:
    """An open file of configfs or sysfs."""

    def __init__(self, file: TsmFile) -> None:
        self._file = file
        self._content: bytes | None = None
        self._buffer: bytearray | None = None

    def read(self, size: int, offset: int) -> bytes:
        """Return at most `size` bytes from `offset`."""
        if self._file.read is None:  # a device
            raise os_error(errno.EINVAL)
        if self._content is None or self._file.live:
            self._content = self._file.read()
        return self._content[offset : offset + size]

    def write(self, data: bytes, offset: int) -> int:
        """Store at once, or keep for `flush`.

        Raises: OSError: EFBIG beyond the file's limit, EINVAL for a measurement of wrong size.
        """
        if self._file.store is None:  # a device
            raise os_error(errno.EINVAL)
        if not self._file.store_at_close:
            return self._write_now(data, offset)
        end = offset + len(data)
        if end > self._file.max_bytes:
            raise os_error(errno.EFBIG)
        buffer = self._buffer if self._buffer is not None else bytearray()
        buffer.extend(bytes(max(0, end - len(buffer))))
        buffer[offset:end] = data
        self._buffer = buffer
        return len(data)

    def _write_now(self, data: bytes, offset: int) -> int:
        """Do what sysfs does: cut at the file's size, so a longer write is a short one."""
        assert self._file.store is not None
        if offset >= self._file.size_bytes:
            raise os_error(errno.EFBIG)
        data = data[: self._file.size_bytes - offset]
        if data:
            if offset or len(data) != self._file.size_bytes:
                raise os_error(errno.EINVAL)
            self._file.store(data)
        return len(data)

    def ioctl(self, command: int, argument: bytes) -> bytes:
        """Return the argument as the driver leaves it.

        Raises: OSError: ENOTTY where the file is no device, or knows no such command.
        """
        if self._file.ioctl is None:
            raise os_error(errno.ENOTTY)
        return self._file.ioctl(command, argument)

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
        self.has_reports = platform.description.faults.tsm == "none"
        self._measurements = _measurement_files(platform)
        self._device = _device(platform) if quoter.has_provider else None

    def entry_name(self, path: str) -> str:
        """Return the name of the report entry that `path` would be.

        Raises: OSError: EPERM for a path anywhere else.
        """
        parts = path.strip("/").split("/")
        if len(parts) != 2 or parts[0] != "report" or not self.has_reports:
            raise os_error(errno.EPERM)
        return parts[1]

    def directory(self, path: str) -> list[str] | None:
        """Return the names in a directory; None if it is not one."""
        parts = path.strip("/").split("/")
        if parts == [""]:
            here = {
                "report": self.has_reports,
                "measurements": bool(self._measurements),
                "tdx_guest": self._device is not None,
                "CCEL": bool(self._platform.event_log),
            }
            return [name for name, present in here.items() if present]
        if parts == ["report"] and self.has_reports:
            return self.reports.names()
        if parts == ["measurements"] and self._measurements:
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
        if parts == ["tdx_guest"]:
            return self._device
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
    """Return the files by the kernel's names: a hash stands in those that are extended by one."""
    if platform.description.faults.rtmr == "absent":
        return {}
    report = platform.report()
    fixed = {
        "mrconfigid": report.mr_config_id,
        "mrowner": report.mr_owner,
        "mrownerconfig": report.mr_owner_config,
        "mrtd:sha384": report.mr_td,
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
            live=True,
            store=functools.partial(_extend, platform, index) if writable else None,
        )
    return files


def _device(platform: SimPlatform) -> TsmFile:
    """Return /dev/tdx_guest, here a regular file: FUSE passes ioctls on to that, too."""
    return TsmFile(mode=0o600, ioctl=functools.partial(_get_report, platform))


def _get_report(platform: SimPlatform, command: int, argument: bytes) -> bytes:
    if command != TDX_CMD_GET_REPORT0:
        raise os_error(errno.ENOTTY)
    fault = platform.description.faults.report
    if fault == "fails":
        raise os_error(errno.EIO)
    report_data = argument[:REPORT_DATA_BYTES]
    used = bytes(REPORT_DATA_BYTES) if fault == "other-data" else report_data
    return report_data + platform.td_report(used)


def _rtmr(platform: SimPlatform, index: int) -> bytes:
    return platform.rtmrs[index]


def _extend(platform: SimPlatform, index: int, digest: bytes) -> None:
    if platform.description.faults.rtmr == "fails":
        raise os_error(errno.EIO)
    platform.extend_rtmr(index, digest)
