"""Mount the tree of `tsm_files` by FUSE.

FUSE sends FLUSH inside close(), and RELEASE some time later: so a commit happens in FLUSH, as the
kernel's happens before close() returns.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import stat
from pathlib import Path
from typing import Any

# mfusepy would take libfuse 2 where both are installed; the name is fixed before its import.
os.environ.setdefault("FUSE_LIBRARY_PATH", "libfuse3.so.3")

import mfusepy

from tdxd.errors import HostError, UsageError
from tdxd.sim.platform import SimPlatform
from tdxd.sim.tsm_entries import Quoter, os_error
from tdxd.sim.tsm_files import Handle, TsmFile, TsmTree

__all__ = ["FS_NAME", "clear_stale_mount", "serve_tsm"]

FS_NAME = "tdx-sim"
_SIGNALLED = 8
"""What libfuse 3 returns when a signal ended its loop: a clean stop."""
_MNT_DETACH = 2


def serve_tsm(platform: SimPlatform, mount_point: Path) -> None:
    """Mount, serve until SIGTERM, SIGINT or an unmount, and leave nothing mounted.

    Must run in the main thread, whose signals libfuse takes.

    Raises: HostError.
    """
    tree = TsmTree(platform, Quoter(platform))
    try:
        mfusepy.FUSE(
            _Operations(tree),
            str(mount_point),
            foreground=True,
            fsname=FS_NAME,
            subtype=FS_NAME,
            direct_io=True,
            attr_timeout=0,
            entry_timeout=0,
            negative_timeout=0,
            max_idle_threads=4,
        )
    except RuntimeError as exc:
        if exc.args != (_SIGNALLED,):
            hint = "FUSE needs /dev/fuse, and root or fusermount3 (Debian: fuse3)"
            raise HostError("mount", str(mount_point), 0, hint=hint) from exc


def clear_stale_mount(mount_point: Path) -> None:
    """Make the directory; detach what a killed simulator left mounted on it.

    Raises: HostError; UsageError if a living one is mounted there.
    """
    try:
        mount_point.stat()
    except FileNotFoundError:
        _make(mount_point)
        return
    except OSError as exc:
        if exc.errno != errno.ENOTCONN:
            raise HostError.of("stat", str(mount_point), exc) from exc
        _detach(mount_point)
        return
    if mount_point.is_mount():
        hint = f"stop the simulator that runs there, or: umount {mount_point}"
        raise UsageError(
            f"{mount_point}: something is mounted there already", hint=hint
        )


def _make(mount_point: Path) -> None:
    try:
        mount_point.mkdir(parents=True)
    except OSError as exc:
        raise HostError.of("mkdir", str(mount_point), exc) from exc


def _detach(mount_point: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(mount_point), _MNT_DETACH):
        raise HostError("umount", str(mount_point), ctypes.get_errno())


class _Operations(mfusepy.Operations):  # type: ignore[misc]
    """FUSE callbacks; threads of libfuse call them side by side.

    No attribute may be named like a FUSE operation (`lock`!): mfusepy would install it.
    """

    use_ns = True

    def __init__(self, tree: TsmTree) -> None:
        self._tree = tree
        self._handles: dict[int, Handle] = {}
        self._numbers = itertools.count(1)
        self._owner = {"st_uid": os.geteuid(), "st_gid": os.getegid()}

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        del fh
        if self._tree.directory(path) is not None:
            return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2, **self._owner}
        file = self._file(path)
        mode = stat.S_IFREG | file.mode
        return {
            "st_mode": mode,
            "st_nlink": 1,
            "st_size": file.size_bytes,
            **self._owner,
        }

    def readdir(self, path: str, fh: int) -> list[str]:
        del fh
        names = self._tree.directory(path)
        if names is None:
            raise os_error(errno.ENOENT)
        return [".", "..", *names]

    def mkdir(self, path: str, mode: int) -> int:
        del mode
        self._tree.reports.make(self._tree.entry_name(path))
        return 0

    def rmdir(self, path: str) -> int:
        self._tree.reports.remove(self._tree.entry_name(path))
        return 0

    def open(self, path: str, flags: int) -> int:
        handle = self._file(path).open(flags)
        number = next(self._numbers)
        self._handles[number] = handle
        return number

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        del path
        return self._handles[fh].read(size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        del path
        return self._handles[fh].write(data, offset)

    def ioctl(
        self, path: str, cmd: int, arg: Any, fh: int, flags: int, data: int | None
    ) -> int:
        del path, arg, flags  # `data` is as long as the command says
        command = cmd & 0xFFFFFFFF
        size = command >> 16 & 0x3FFF
        argument = ctypes.string_at(data, size) if data else b""
        answer = self._handles[fh].ioctl(command, argument)
        if data:
            ctypes.memmove(data, answer, min(size, len(answer)))
        return 0

    def flush(self, path: str, fh: int) -> int:
        del path
        self._handles[fh].flush()
        return 0

    def release(self, path: str, fh: int) -> int:
        del path
        self._handles.pop(fh, None)
        return 0

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        del length, fh  # O_TRUNC of a shell's redirection: nothing to cut
        if self._file(path).store is None:
            raise os_error(errno.EACCES)
        return 0

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        del path, mode, fi
        raise os_error(errno.EACCES)

    def unlink(self, path: str) -> int:
        del path
        raise os_error(errno.EPERM)

    def _file(self, path: str) -> TsmFile:
        file = self._tree.file(path)
        if file is None:
            raise os_error(errno.ENOENT)
        return file
