"""Loop devices: attach a descriptor, find and detach ours.

All of ours are autoclear: the kernel lets go of one when its last opener, or the mount on it, is
gone, also after a crash. They are read-only but below a volume that its owner wants writable.

Source: Linux, include/uapi/linux/loop.h; loop(4).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import time
from pathlib import Path

from tdxd.core.bundle import BLOCK_BYTES
from tdxd.errors import HostError

__all__ = ["LoopDevice", "attach", "attached", "detach"]

_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LOOP_CLR_FD = 0x4C01
_LO_FLAGS_READ_ONLY = 1
_LO_FLAGS_AUTOCLEAR = 4
_LO_FLAGS_DIRECT_IO = 16
_NAME_BYTES = 64
_CONFIG = struct.Struct(f"<II5Q4I{_NAME_BYTES}s64s32s2Q8Q")
"""struct loop_config: fd, block_size, struct loop_info64, 8 reserved; 304 bytes."""
_CONTROL = "/dev/loop-control"
_BUSY_TIMEOUT_S = 5.0
_BUSY_SLEEP_S = 0.004
_HINT = "this needs root, and the kernel's loop driver (modprobe loop)"

LoopDevice = tuple[str, int]
"""The device's path, and an open descriptor of it, which keeps it attached."""


def attach(
    fd: int,
    *,
    name: str,
    offset_bytes: int = 0,
    size_bytes: int = 0,
    direct_io: bool = False,
    block_bytes: int = BLOCK_BYTES,
    writable: bool = False,
) -> LoopDevice:
    """Attach a regular file's descriptor to a free loop device, read-only and autoclear.

    A `writable` one needs a descriptor that is open for writing, too. The device shows
    `size_bytes` of the file from `offset_bytes` on (0: all that follows), in sectors of
    `block_bytes`. With `direct_io` the file's own pages are not cached a second time, where its
    file system can. `name` is shown by losetup. The caller owns the returned descriptor; `fd`
    may be closed.

    Raises: HostError.
    """
    flags = _LO_FLAGS_AUTOCLEAR | (0 if writable else _LO_FLAGS_READ_ONLY)
    kept = name.encode()[: _NAME_BYTES - 1]
    wanted = (flags | _LO_FLAGS_DIRECT_IO, flags) if direct_io else (flags,)
    configs = [
        _CONFIG.pack(
            fd,
            block_bytes,
            *(0, 0, 0, offset_bytes, size_bytes, 0, 0, 0, one),
            *(kept, b"", b"", 0, 0),
            *([0] * 8),
        )
        for one in wanted
    ]
    try:
        control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise HostError.of("open", _CONTROL, exc, hint=_HINT) from exc
    try:
        deadline_s = time.monotonic() + _BUSY_TIMEOUT_S
        while time.monotonic() < deadline_s:
            made = _try(control, configs, os.O_RDWR if writable else os.O_RDONLY)
            if made is not None:
                return made
            # All that ask at one moment are told of the same device, and one of them gets it.
            time.sleep(os.urandom(1)[0] / 255 * _BUSY_SLEEP_S)
    finally:
        os.close(control)
    raise HostError("attach a loop device to", name, errno.EBUSY)


def _try(control: int, configs: list[bytes], access: int) -> LoopDevice | None:
    """Try one free device; `None` if somebody else took it first."""
    path = "/dev/loop"
    try:
        path = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
        device = os.open(path, access | os.O_CLOEXEC)
    except OSError as exc:
        raise HostError.of("open", path, exc, hint=_HINT) from exc
    try:
        if not stat.S_ISBLK(os.fstat(device).st_mode):
            raise OSError(errno.ENOTBLK, os.strerror(errno.ENOTBLK))
        _configure(device, configs)
    except OSError as exc:
        os.close(device)
        if exc.errno == errno.EBUSY:
            return None
        raise HostError.of("configure", path, exc) from exc
    return path, device


def _configure(device: int, configs: list[bytes]) -> None:
    """Take the first configuration that the kernel accepts: not every file has direct I/O."""
    *better, last = configs
    for config in better:
        try:
            fcntl.ioctl(device, _LOOP_CONFIGURE, config)
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
        else:
            return
    fcntl.ioctl(device, _LOOP_CONFIGURE, last)


def attached(prefix: str) -> tuple[str, ...]:
    """Return the loop devices whose backing file's name starts with `prefix`."""
    found = []
    for entry in sorted(Path("/sys/block").glob("loop*")):
        with contextlib.suppress(OSError):  # detached between the listing and the look
            backing = (entry / "loop/backing_file").read_text(errors="surrogateescape")
            if backing.startswith(prefix):
                found.append(f"/dev/{entry.name}")
    return tuple(found)


def detach(path: str) -> None:
    """Detach a loop device, at once or when its last user is gone; harmless when repeated.

    Raises: HostError.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise HostError.of("open", path, exc) from exc
    try:
        fcntl.ioctl(fd, _LOOP_CLR_FD)
    except OSError as exc:
        if exc.errno != errno.ENXIO:
            raise HostError.of("detach", path, exc) from exc
    finally:
        os.close(fd)
