"""This process and this machine: hardening at start, and what the machine must not have."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from pathlib import Path

from tdxd.errors import HostError

__all__ = ["boot_id", "harden", "is_tdx_guest", "swap_areas"]

_PR_SET_DUMPABLE = 4
"""Source: prctl(2)."""
_CORE_FILTER = "/proc/self/coredump_filter"


def harden() -> None:
    """Let no core dump, debugger or other process of our uid read this process's memory.

    RLIMIT_CORE alone still feeds core handlers that the kernel pipes to; a process that is
    not dumpable leaves nothing to pipe. Children become dumpable again when they exec, but what
    they inherit keeps all memory out of their cores: an empty coredump_filter (core(5)).

    Raises: HostError.
    """
    try:
        Path(_CORE_FILTER).write_text("0", encoding="ascii")
    except OSError as exc:
        raise HostError.of("write", _CORE_FILTER, exc) from exc
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


def is_tdx_guest(path: str = "/proc/cpuinfo") -> bool:
    """Say whether Intel TDX protects this machine, as the kernel found at its start."""
    with contextlib.suppress(OSError), open(path, "rb") as lines:
        flags = next((line for line in lines if line.startswith(b"flags")), b"")
        return b"tdx_guest" in flags.partition(b":")[2].split()
    return False


def boot_id(path: str = "/proc/sys/kernel/random/boot_id") -> str:
    """Return what names this boot of the kernel (random(4)).

    Raises: HostError.
    """
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError as exc:
        raise HostError.of("read", path, exc) from exc
