"""Looks at a directory before it is sealed: what it holds, and what must not be in it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tdxd.core.bundle import BLOCK_BYTES
from tdxd.errors import DataError, HostError

__all__ = ["check_space", "survey"]

_FIXED_BYTES = 64 * 2**20
"""Headers, hash tree of a small image, slack."""


def survey(directory: Path) -> int:
    """Return about how many bytes the file system will take.

    Raises: DataError for a directory without models, and for anything in it that is neither a
    file nor a directory.
    """
    if not directory.is_dir():
        raise DataError(f"{directory} is not a directory")
    _check_models(directory)
    size_bytes = 0
    for where, names, files in os.walk(directory, onerror=_unreadable):
        for name in names + files:
            path = Path(where, name)
            seen = path.lstat()
            _check_kind(path, seen.st_mode)
            size_bytes += -(-seen.st_size // BLOCK_BYTES) * BLOCK_BYTES + 128
    return size_bytes


def _unreadable(exc: OSError) -> None:
    raise HostError.of("read", str(exc.filename), exc) from exc


def _check_models(directory: Path) -> None:
    models = directory / "models"
    names = sorted(one.name for one in models.iterdir()) if models.is_dir() else []
    if not names:
        hint = "a sealed directory holds models/NAME/VERSION/saved_model.pb, and tls/server.pem"
        raise DataError(f"{directory} holds no models", hint=hint)


def _check_kind(path: Path, mode: int) -> None:
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return
    if stat.S_ISLNK(mode):
        # The guest mounts without following links, so even one that stays inside is useless.
        raise DataError(
            f"{path} is a symbolic link, to {os.readlink(path)}",
            hint="the guest follows no links: copy the directory with cp -rL",
        )
    kind = "a FIFO" if stat.S_ISFIFO(mode) else "a socket or device"
    raise DataError(f"{path} is {kind}", hint="only files and directories are sealed")


def check_space(directory: Path, size_bytes: int) -> None:
    """Refuse to begin what cannot end.

    Raises: HostError if the output directory does not exist; DataError if it is too full.
    """
    try:
        seen = os.statvfs(directory)
    except OSError as exc:
        raise HostError.of("look at", str(directory), exc) from exc
    free, needed = seen.f_bavail * seen.f_frsize, size_bytes + _FIXED_BYTES
    if free < needed:
        raise DataError(
            f"{directory} has {free >> 20} MiB free, sealing needs {needed >> 20} MiB",
            hint="the plaintext is staged once: free space there, or name another directory",
        )
