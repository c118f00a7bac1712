"""Control groups: a child gets no more than its share of memory and of processors.

systemd delegates the unit's group to the daemon (`Delegate=`). A group with controllers for its
children may hold no process itself, so the daemon moves to a child group of its own first.

Source: Documentation/admin-guide/cgroup-v2.rst; systemd.resource-control(5), Delegate=.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import Final

from tdxd.errors import HostError

__all__ = ["ControlGroups", "Limits"]

_ROOT: Final = "/sys/fs/cgroup"
_DAEMON: Final = "daemon"
_CONTROLLERS: Final = ("memory", "cpu", "pids")
_PERIOD_US: Final = 100_000
_PROCESSES_MAX: Final = 4096
"""Threads count, too; TensorFlow starts a few for each processor."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`None`: no limit. `cpus` may be a fraction."""

    memory_bytes: int | None = None
    cpus: float | None = None

    def files(self) -> dict[str, str]:
        """Return what is written to which file of a group."""
        made = {"pids.max": str(_PROCESSES_MAX)}
        if self.memory_bytes is not None:
            made["memory.max"] = str(self.memory_bytes)
            made["memory.swap.max"] = "0"
            made["memory.oom.group"] = "1"
        if self.cpus is not None:
            quota_us = max(1000, round(self.cpus * _PERIOD_US))
            made["cpu.max"] = f"{quota_us} {_PERIOD_US}"
        return made


class ControlGroups:
    """The groups below the daemon's own; `problem` says why there are none, if so."""

    def __init__(self, root: str = _ROOT, own: str | None = None) -> None:
        self._base = ""
        self.problem = ""
        try:
            self._base = _delegated(root, own if own is not None else _own_group())
        except OSError as exc:
            self.problem = f"{exc.filename}: {exc.strerror}"
        except LookupError as exc:
            self.problem = str(exc.args[0])

    def confine(self, name: str, pid: int, limits: Limits) -> None:
        """Put a process, with all it will start, into a group with these limits.

        Raises: HostError.
        """
        group = os.path.join(self._base, name)
        try:
            os.makedirs(group, exist_ok=True)
            for file, text in limits.files().items():
                _write(os.path.join(group, file), text)
            _write(os.path.join(group, "cgroup.procs"), str(pid))
        except OSError as exc:
            raise HostError.of("limit", group, exc) from exc


def _own_group() -> str:
    """Return this process's group in the unified hierarchy.

    Raises: LookupError, OSError.
    """
    with open("/proc/self/cgroup", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("0::"):
                return line.strip().removeprefix("0::").removesuffix(f"/{_DAEMON}")
    raise LookupError("this kernel has no unified control groups")


def _delegated(root: str, own: str) -> str:
    """Make the daemon's own group a leaf, and switch the controllers on for its children.

    Raises: LookupError if it was not delegated, OSError.
    """
    if own in ("", "/"):
        raise LookupError(
            "the daemon is in the root control group: no unit delegates one"
        )
    base = os.path.join(root, own.lstrip("/"))
    with open(os.path.join(base, "cgroup.controllers"), encoding="ascii") as file:
        there = file.read().split()
    missing = [one for one in _CONTROLLERS if one not in there]
    if missing:
        raise LookupError(f"control group {own} has no {', '.join(missing)}")
    leaf = os.path.join(base, _DAEMON)
    os.makedirs(leaf, exist_ok=True)
    with open(os.path.join(base, "cgroup.procs"), encoding="ascii") as file:
        pids = file.read().split()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            _write(os.path.join(leaf, "cgroup.procs"), pid)
    enable = " ".join(f"+{one}" for one in _CONTROLLERS)
    _write(os.path.join(base, "cgroup.subtree_control"), enable)
    return base


def _write(path: str, text: str) -> None:
    """Write to a file of the kernel's, which is there already."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
