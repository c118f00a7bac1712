"""The firmware's event log (CCEL) as the kernel shows it."""

from __future__ import annotations

from tdxd.core.eventlog import MAX_LOG_BYTES
from tdxd.errors import EvidenceUnavailableError
from tdxd.host.bounded import read_bounded

__all__ = ["read_event_log"]


def read_event_log(path: str) -> bytes:
    """Return the CCEL data, at most 1 MiB; empty if this platform has none.

    Raises: EvidenceUnavailableError.
    """
    try:
        return read_bounded(path, MAX_LOG_BYTES)
    except FileNotFoundError:
        return b""
    except OSError as exc:
        raise EvidenceUnavailableError(f"read {path}: {exc.strerror}") from exc
