"""System calls that fail: the error names the operation and its object."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tdxd.errors import HostError

__all__ = ["as_host_error"]


@contextlib.contextmanager
def as_host_error(op: str, path: str) -> Iterator[None]:
    """Turn the OSError of a with block into a HostError."""
    try:
        yield
    except OSError as exc:
        raise HostError.of(op, path, exc) from exc
