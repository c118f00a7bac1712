"""This process and this machine: hardening at start, and what the machine must not have."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from pathlib import Path

from tdxd.errors import HostError

__all__ = ["available_memory_bytes", "boot_id", "harden", "is_tdx_guest", "swap_areas"]

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


def available_memory_bytes(proc: str = "/proc", cgroups: str = "/sys/fs/cgroup") -> int:
    """Return how much memory this process could still get without swapping.

    It is what the kernel estimates for the machine, or what a control group above this process
    still allows, whichever is less. File caches count as available.

    Raises: HostError.
    Source: proc(5) "MemAvailable"; Linux, Documentation/admin-guide/cgroup-v2.rst.
    """
    path = f"{proc}/meminfo"
    try:
        facts = _numbers(Path(path))
        group = Path(f"{proc}/self/cgroup").read_text(encoding="utf-8")
    except OSError as exc:
        raise HostError.of("read", exc.filename or path, exc) from exc
    left = [facts.get("MemAvailable:", 0) * 1024]
    own = [line[3:].lstrip("/") for line in group.splitlines() if line[:3] == "0::"]
    for name in own:
        directory = Path(cgroups) / name
        for one in (directory, *directory.parents):
            if not one.is_relative_to(cgroups):
                break
            # The root group has no limit, and a group that is hidden from us cannot be asked.
            with contextlib.suppress(OSError, ValueError):
                left.append(_left_in_group(one))
    return min(left)


def _left_in_group(directory: Path) -> int:
    """Return what a control group still allows.

    Raises: ValueError if it has no limit ("max"); OSError.
    """
    limit = int((directory / "memory.max").read_text())
    used = int((directory / "memory.current").read_text())
    cached = _numbers(directory / "memory.stat")
    reclaimable = cached.get("active_file", 0) + cached.get("inactive_file", 0)
    return max(0, limit - used + reclaimable)


def _numbers(path: Path) -> dict[str, int]:
    """Read lines of a name and a number."""
    lines = path.read_text(encoding="ascii").splitlines()
    return {words[0]: int(words[1]) for words in map(str.split, lines)}
