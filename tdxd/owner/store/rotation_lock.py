"""The lock of whoever needs database and key files to belong together for a while.

A rotation holds it alone, a backup that copies both shares it. It lies on the public half, which a
rotation replaces: hence the second look.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from tdxd.errors import HostError
from tdxd.owner.store.kek import PUBLIC_NAME

__all__ = ["rotation_locked"]


@contextlib.contextmanager
def rotation_locked(directory: Path, *, exclusive: bool) -> Iterator[None]:
    """Wait for the lock of a store directory and hold it.

    Raises: HostError.
    """
    path = directory / PUBLIC_NAME
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    try:
        fd = _locked(path, kind)
    except OSError as exc:
        raise HostError.of("lock", str(path), exc) from exc
    try:
        yield
    finally:
        os.close(fd)


def _locked(path: Path, kind: int) -> int:
    while True:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, kind)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # replaced while this waited: it is the lock of nothing
