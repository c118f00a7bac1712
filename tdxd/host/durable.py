"""Files that are replaced as a whole, or not at all."""

from __future__ import annotations

import contextlib
import os

from tdxd.errors import HostError

__all__ = ["replace_file"]


def replace_file(path: str, data: bytes) -> None:
    """Make `path` a file of mode 0600 with these bytes; after a crash it is the old or the new one.

    Makes the directory if it is missing, mode 0700.

    Raises: HostError.
    """
    directory, fresh = os.path.dirname(path), f"{path}.new"
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(fresh, flags, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
        _sync_directory(directory)
    except OSError as exc:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise HostError.of("write", path, exc) from exc


def _sync_directory(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
