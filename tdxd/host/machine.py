"""This process and this machine: hardening at start, and what the machine must not have."""

from __future__ import annotations

import ctypes
import os
import resource

from tdxd.errors import HostError

__all__ = ["harden", "swap_areas"]

_PR_SET_DUMPABLE = 4
"""Source: prctl(2)."""


def harden() -> None:
    """Let no core dump, debugger or other process of our uid read this process's memory.

    RLIMIT_CORE alone still feeds core handlers that the kernel pipes to; a process that is
    not dumpable leaves nothing to pipe.

    Raises: HostError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise HostError("prctl", "PR_SET_DUMPABLE", ctypes.get_errno())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)


def swap_areas(path: str = "/proc/swaps") -> tuple[str, ...]:
    """Return the active swap areas (proc(5)); memory can land there in the clear."""
    try:
        with open(path, encoding="utf-8", errors="replace") as lines:
            return tuple(line.split()[0] for line in list(lines)[1:] if line.strip())
    except FileNotFoundError:
        return ()  # a kernel without swap
