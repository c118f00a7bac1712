"""Files of the key server's store directory: private ones are 0600 and nobody else's."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tdxd.errors import ConfigError, HostError

__all__ = [
    "read_bytes",
    "read_private",
    "read_text",
    "replace_public",
    "write_private",
    "write_public",
]

_MAX_BYTES = 1024 * 1024


def read_bytes(path: Path, *, max_bytes: int = _MAX_BYTES) -> bytes:
    """Read a small file.

    Raises: HostError, ConfigError for more than `max_bytes`, by default 1 MiB.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as exc:
        raise HostError.of("read", str(path), exc) from exc
    if len(data) > max_bytes:
        raise ConfigError(f"{path} is larger than {max_bytes} bytes")
    return data


def read_text(path: Path) -> str:
    """Read a small UTF-8 file.

    Raises: HostError, ConfigError.
    """
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path} is not UTF-8 text") from exc


def read_private(path: Path) -> bytes:
    """Read a file that only its owner may read.

    Raises: HostError, ConfigError.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as exc:
        raise HostError.of("read", str(path), exc) from exc
    if mode & 0o077:
        raise ConfigError(
            f"{path} has mode {mode:04o}, so others may read it",
            hint=f"chmod 600 {path}; think about who has read it",
        )
    return read_bytes(path)


def write_private(path: Path, data: bytes) -> None:
    """Write a new file of mode 0600, down to the disk.

    Raises: HostError; an existing file is never overwritten.
    """
    _write(path, data, 0o600)


def write_public(path: Path, data: bytes) -> None:
    """Write a new file of mode 0644, down to the disk.

    Raises: HostError; an existing file is never overwritten.
    """
    _write(path, data, 0o644)


def _write(path: Path, data: bytes, mode: int) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(data)
            file.flush()
            os.fsync(fd)
    except OSError as exc:
        raise HostError.of("create", str(path), exc) from exc


def replace_public(path: Path, data: bytes) -> None:
    """Write a file of mode 0644 in place of what is there: readers see the old one or the new one.

    Raises: HostError.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.unlink(missing_ok=True)
        _write(beside, data, 0o644)
        os.replace(beside, path)
        fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as exc:
        raise HostError.of("replace", str(path), exc) from exc
