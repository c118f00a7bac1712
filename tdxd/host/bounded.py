"""Read a file whole that does not tell its size, within a limit."""

from __future__ import annotations

import os

from tdxd.errors import EvidenceUnavailableError

__all__ = ["read_bounded"]


def read_bounded(path: str, max_bytes: int) -> bytes:
    """Read to the end; files of configfs and sysfs do not tell their size beforehand.

    Raises: EvidenceUnavailableError beyond the limit, also for a device that never ends; OSError.
    """
    parts: list[bytes] = []
    size = 0
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while part := os.read(fd, max_bytes + 1 - size):
            parts.append(part)
            size += len(part)
            if size > max_bytes:
                text = f"{path} is longer than {max_bytes} bytes"
                hint = "nothing that is right is so long: what lies there is something else"
                raise EvidenceUnavailableError(text, hint=hint)
    finally:
        os.close(fd)
    return b"".join(parts)
