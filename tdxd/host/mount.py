"""Mounts: mount(2), umount2(2) and mountinfo, in the daemon's private mount namespace.

Source: mount(2), umount2(2), proc(5) "/proc/pid/mountinfo"; flags from linux/mount.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re

from tdxd.errors import BusyError, HostError
from tdxd.host.os_error import as_host_error
from tdxd.host.ports import MappedVolume

__all__ = [
    "KernelMounts",
    "bind",
    "detach",
    "isolate",
    "mount_points",
    "mount_tmpfs",
    "move",
    "remount_read_only",
]

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_NOSYMFOLLOW = 0x100
MS_BIND = 0x1000
MS_MOVE = 0x2000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 0x2
_CLONE_NEWNS = 0x00020000
_VOLUME_FLAGS = MS_NODEV | MS_NOSUID | MS_NOEXEC | MS_NOSYMFOLLOW
_BARE = MS_NODEV | MS_NOSUID | MS_NOEXEC

_libc = ctypes.CDLL(None, use_errno=True)
_OCTAL = re.compile(r"\\([0-7]{3})")


def _mount(
    source: str, target: str, fs: str | None, flags: int, data: str = ""
) -> None:
    arguments = (
        os.fsencode(source),
        os.fsencode(target),
        fs.encode() if fs else None,
        ctypes.c_ulong(flags),
        data.encode() or None,
    )
    if _libc.mount(*arguments) != 0:
        raise HostError("mount", target, ctypes.get_errno())


def _umount(target: str, flags: int) -> int:
    """Return 0 or the error number."""
    if _libc.umount2(os.fsencode(target), flags) == 0:
        return 0
    return ctypes.get_errno()


def isolate() -> None:
    """Give this process a mount namespace of its own, from which nothing propagates.

    Call it before any thread exists: a thread started earlier would stay outside.

    Raises: HostError.
    """
    if _libc.unshare(_CLONE_NEWNS) != 0:
        hint = "tdxd needs CAP_SYS_ADMIN: run it as root"
        raise HostError("unshare", "mount namespace", ctypes.get_errno(), hint=hint)
    _mount("none", "/", None, MS_REC | MS_PRIVATE)


def mount_points(mountinfo: str = "/proc/self/mountinfo") -> tuple[str, ...]:
    """Return all mount points, in the order they were mounted."""
    with open(mountinfo, encoding="utf-8", errors="surrogateescape") as lines:
        return tuple(_unescape(line.split(" ")[4]) for line in lines)


def _unescape(text: str) -> str:
    """Undo the kernel's octal escapes of space, tab, newline and backslash."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)


def mount_tmpfs(target: str, *, size_bytes: int) -> None:
    """Mount an empty tmpfs, mode 0755.

    Raises: HostError.
    """
    _mount("tmpfs", target, "tmpfs", _BARE, f"mode=0755,size={size_bytes}")


def bind(source: str, target: str) -> None:
    """Bind a directory to another place; it keeps the flags of its mount.

    Raises: HostError.
    """
    _mount(source, target, None, MS_BIND)


def move(source: str, target: str) -> None:
    """Move a mount, over whatever lies at the target.

    Raises: HostError.
    """
    _mount(source, target, None, MS_MOVE)


def remount_read_only(target: str) -> None:
    """Make one mount read-only for this namespace.

    Raises: HostError.
    """
    _mount("none", target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | _BARE)


def detach(target: str) -> None:
    """Take a mount out of this namespace, even if it is in use; harmless when not mounted."""
    _umount(target, MNT_DETACH)


class KernelMounts:
    """Mounts volumes; implements `ports.Mounts`."""

    def mount_volume(self, mapped: MappedVolume, target: str) -> None:
        """Make the directory and mount nodev, nosuid, noexec, nosymfollow.

        Read-only unless the volume is writable; read-only ext4 leaves its journal alone (`noload`),
        since replaying it would write. The caller may close `mapped.fd` afterwards: the mount
        keeps the loop device.

        Raises: HostError, and leaves no directory behind.
        """
        with as_host_error("make", target):
            os.makedirs(target, mode=0o700, exist_ok=True)
        try:
            _mount(mapped.device, target, mapped.manifest.fs, *_how(mapped))
        except HostError:
            _remove_directory(target)
            raise

    def unmount(self, target: str) -> None:
        """Unmount and remove the directory; harmless when not mounted.

        Raises: BusyError, HostError.
        """
        number = _umount(target, 0)
        if number == errno.EBUSY:
            hint = "a process still has a file open below it"
            raise BusyError(f"unmount {target}: in use", hint=hint)
        if number not in (0, errno.EINVAL, errno.ENOENT):
            raise HostError("unmount", target, number)
        _remove_directory(target)

    def under(self, directory: str) -> tuple[str, ...]:
        """Return the mount points below `directory`, deepest last."""
        below = [point for point in mount_points() if point.startswith(directory + "/")]
        return tuple(sorted(below, key=lambda point: point.count("/")))


def _how(mapped: MappedVolume) -> tuple[int, str]:
    """Return the flags and the file system's own options."""
    flags = _VOLUME_FLAGS | (0 if mapped.writable else MS_RDONLY)
    if mapped.manifest.fs != "ext4":
        return flags, ""
    # Its superblock may ask for a panic instead, which any flipped bit would bring about.
    options = "errors=remount-ro"
    return flags, options if mapped.writable else f"noload,{options}"


def _remove_directory(path: str) -> None:
    with contextlib.suppress(OSError):  # kept if something else put files there
        os.rmdir(path)
