"""What the kernel counts of this process, under the names that all of Prometheus' clients use.

Source: proc_pid_stat(5); proc_stat(5), btime; Prometheus, "Writing client libraries", process
metrics.
"""

from __future__ import annotations

import os
import resource

from tdxd.core.exposition import Family

__all__ = ["process_families"]

_UTIME, _STIME, _STARTTIME, _VSIZE, _RSS = 11, 12, 19, 20, 21
"""Fields 14, 15, 22 to 24, counted from the one after the name."""


def process_families() -> list[Family]:
    """Return CPU time, memory, descriptors and the start of this process."""
    with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    start_s = _boot_s() + int(fields[_STARTTIME]) * tick_s
    cpu_s = (int(fields[_UTIME]) + int(fields[_STIME])) * tick_s
    families = []
    for name, kind, about, value in (
        ("cpu_seconds_total", "counter", "CPU time spent, user and system.", cpu_s),
        ("start_time_seconds", "gauge", "Start of the process, unix time.", start_s),
        ("virtual_memory_bytes", "gauge", "Address space.", int(fields[_VSIZE])),
        (
            "resident_memory_bytes",
            "gauge",
            "Memory in RAM.",
            int(fields[_RSS]) * resource.getpagesize(),
        ),
        ("open_fds", "gauge", "Open descriptors.", len(os.listdir("/proc/self/fd"))),
        (
            "max_fds",
            "gauge",
            "Descriptors that may be open.",
            resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        ),
    ):
        family = Family(f"process_{name}", kind, about)  # type: ignore[arg-type]
        family.add(value)
        families.append(family)
    return families


def _boot_s() -> int:
    """Return when the machine was booted, unix time; its clock may be wrong."""
    with open("/proc/stat", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("btime "))
