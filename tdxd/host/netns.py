"""Cells: namespaces in which children see their models, a socket directory and nothing else.

A cell is an anonymous mount namespace; all cells share one anonymous network namespace whose only
interface is `lo`. Both are held by descriptor: nothing is left under /run/netns, and when
the last holder ends the kernel removes them.

Namespaces are made in a thread of their own that ends (`unshare` acts on the calling thread, so a
reused worker would carry the namespace on). Source: unshare(2), namespaces(7).
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import os
import threading
from collections.abc import Callable, Sequence

from tdxd.errors import HostError
from tdxd.host import mount

__all__ = [
    "CLONE_NEWNET",
    "CLONE_NEWNS",
    "NamespaceCell",
    "TmpMount",
    "check_namespace",
    "make_cell",
    "make_network",
]

CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000
"""Flags of unshare(2), linux/sched.h."""

_libc = ctypes.CDLL(None, use_errno=True)


class NamespaceCell:
    """The descriptors of one cell's mount namespace and of the shared network namespace.

    Only the mount namespace belongs to the cell and is closed with it.
    """

    def __init__(self, mount_fd: int, net_fd: int) -> None:
        self.mount_fd = mount_fd
        self.net_fd = net_fd

    def close(self) -> None:
        """Let go of the mount namespace; harmless when repeated."""
        if self.mount_fd >= 0:
            os.close(self.mount_fd)
            self.mount_fd = -1


def check_namespace(fd: int, kind: str) -> None:
    """Check that a descriptor is one of a namespace: `mnt` or `net`.

    Raises: OSError.
    """
    name = os.readlink(f"/proc/self/fd/{fd}")
    if not name.startswith(f"{kind}:["):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), name)


def make_network() -> int:
    """Make a network namespace with `lo` up; return its descriptor.

    Raises: HostError.
    """

    def body() -> int:
        _unshare(CLONE_NEWNET)
        from pyroute2 import IPRoute

        with IPRoute() as route:
            route.link("set", index=1, state="up")
        return _namespace("net")

    return _in_own_thread(body)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TmpMount:
    """A tmpfs at `path`, of one user: nobody else can look into it."""

    path: str
    uid: int
    gid: int
    size_bytes: int


def make_cell(
    *,
    net_fd: int,
    hide: str,
    binds: Sequence[tuple[str, str]],
    tmp: TmpMount | None = None,
) -> NamespaceCell:
    """Make a mount namespace where `hide` holds nothing but `binds` (source, target) and `tmp`.

    Every other mount below `hide` is dropped from the namespace, so a child in it keeps no other
    volume alive.

    Raises: HostError.
    """

    def body() -> int:
        _unshare(CLONE_NEWNS)
        # The umask is the thread's own from here on (CLONE_NEWNS implies CLONE_FS): the
        # child's user must pass through the directories made below.
        os.umask(0o022)
        _fill(hide, binds, tmp)
        return _namespace("mnt")

    return NamespaceCell(_in_own_thread(body), net_fd)


def _fill(hide: str, binds: Sequence[tuple[str, str]], tmp: TmpMount | None) -> None:
    """Build the new `hide` beside the old one, drop the old mounts, then move it over."""
    stage = os.path.join(hide, "stage")
    os.makedirs(stage, mode=0o700, exist_ok=True)
    mount.mount_tmpfs(stage, size_bytes=1024 * 1024)
    for source, target in binds:
        place = os.path.join(stage, os.path.relpath(target, hide))
        os.makedirs(place, mode=0o755)
        mount.bind(source, place)
    if tmp is not None:
        place = os.path.join(stage, os.path.relpath(tmp.path, hide))
        os.makedirs(place, mode=0o755)
        mount.mount_tmpfs(place, size_bytes=tmp.size_bytes)
        os.chmod(place, 0o700)
        os.chown(place, tmp.uid, tmp.gid)
    old = [
        point
        for point in mount.mount_points("/proc/thread-self/mountinfo")
        if point.startswith(hide + "/") and not (point + "/").startswith(stage + "/")
    ]
    for point in reversed(old):
        mount.detach(point)
    mount.remount_read_only(stage)
    mount.move(stage, hide)


def _unshare(flags: int) -> None:
    if _libc.unshare(flags) != 0:
        number = ctypes.get_errno()
        hint = "tdxd needs CAP_SYS_ADMIN and a kernel with namespaces"
        raise HostError("unshare", hex(flags), number, hint=hint)


def _namespace(kind: str) -> int:
    return os.open(f"/proc/thread-self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)


def _in_own_thread(body: Callable[[], int]) -> int:
    """Run `body` in a fresh thread; return its value or raise its error."""
    results: list[int] = []
    errors: list[HostError] = []

    def run() -> None:
        try:
            results.append(body())
        except HostError as exc:
            errors.append(exc)
        except OSError as exc:
            errors.append(HostError.of("make namespace", str(exc.filename or ""), exc))

    thread = threading.Thread(target=run, name="namespace")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
