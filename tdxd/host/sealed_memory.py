"""Memory files that nobody can change any more: the one place where a secret's content lies.

A memfd has no name on a disk and is never in a core dump. Its pages go when its last descriptor is
closed; the kernel clears them before anybody gets them. Source: memfd_create(2), fcntl(2).
"""

from __future__ import annotations

import fcntl
import os

from tdxd.errors import HostError

__all__ = ["is_sealed", "read_sealed", "sealed_memory"]

_SEALS = (
    fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
)


def sealed_memory(name: str, content: bytes) -> int:
    """Return the descriptor of a memory file with this content, closed on exec.

    Raises: HostError.
    """
    fd = -1
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.fchmod(fd, 0o400)
        with open(fd, "wb", closefd=False, buffering=0) as file:
            file.write(content)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as exc:
        if fd >= 0:
            os.close(fd)
        raise HostError.of("memfd_create", name, exc) from exc
    return fd


def is_sealed(fd: int) -> bool:
    """Say whether a descriptor is one of a memory file that nobody can change."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        return False


def read_sealed(fd: int, max_bytes: int) -> bytes:
    """Return what a memory file holds, at most `max_bytes`.

    Raises: HostError.
    """
    try:
        return os.pread(fd, max_bytes, 0)
    except OSError as exc:
        raise HostError.of("read", f"descriptor {fd}", exc) from exc
