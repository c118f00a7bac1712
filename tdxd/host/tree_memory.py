"""How much memory a process takes with all that it started.

Source: proc_pid_smaps(5), "smaps_rollup"; proc_pid_statm(5); proc_pid_stat(5), field 4 (ppid).
"""

from __future__ import annotations

import contextlib
import os

__all__ = ["tree_memory_bytes"]

_PPID = 1
"""Field 4, counted from the one after the name."""
_RESIDENT = 1


def tree_memory_bytes(pid: int, proc: str = "/proc") -> int:
    """Return the memory of a process and its descendants; 0 if it has ended.

    Pages that several share count once, if the kernel lets us look so closely; else for each.
    """
    return sum(_memory_bytes(f"{proc}/{one}") for one in _tree(pid, proc))


def _tree(pid: int, proc: str) -> list[int]:
    parents = {}
    for name in os.listdir(proc):
        if name.isdigit():
            with (
                contextlib.suppress(OSError),
                open(f"{proc}/{name}/stat", "rb") as file,
            ):
                fields = file.read().rpartition(b")")[2].split()
                parents[int(name)] = int(fields[_PPID])
    found = [pid]
    for one in found:  # grows as it goes
        found += [child for child, parent in parents.items() if parent == one]
    return found


def _memory_bytes(directory: str) -> int:
    try:
        with open(f"{directory}/smaps_rollup", "rb") as file:
            for line in file:
                if line.startswith(b"Pss:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not ours to look at: the next is open to all
    try:
        with open(f"{directory}/statm", "rb") as file:
            return int(file.read().split()[_RESIDENT]) * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError):
        return 0
