"""How benchmarks measure: whole processes in pairs, processor time, resident memory.

A time alone says more about the machine and its other load than about the program, so two programs
are run alternately, and what counts is the median of the ratios within each pair.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

__all__ = ["Paired", "Spent", "paired", "peak_memory", "rss_bytes", "run_process"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What one process cost, from its start until it was reaped."""

    wall_s: float
    cpu_s: float
    """User and system time, of the children it has reaped, too."""
    max_rss_bytes: int


def run_process(argv: Sequence[str]) -> Spent:
    """Run a program with its output thrown away.

    Raises: RuntimeError if it fails.
    """
    quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    start_s = time.perf_counter()
    pid = os.posix_spawn(argv[0], tuple(argv), os.environ, file_actions=quiet)
    _, status, usage = os.wait4(pid, 0)
    wall_s = time.perf_counter() - start_s
    code = os.waitstatus_to_exitcode(status)
    if code != 0:
        raise RuntimeError(f"{' '.join(argv)} ended with status {code}")
    return Spent(
        wall_s=wall_s,
        cpu_s=usage.ru_utime + usage.ru_stime,
        max_rss_bytes=usage.ru_maxrss * 1024,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """Medians of two alternating measurements, and the ratios first/second of the pairs."""

    first: float
    second: float
    ratio: float
    low: float
    high: float
    pairs: int

    def spread(self) -> str:
        """Say how far the ratios of the pairs lie apart."""
        return f"ratios {self.low:.2f} to {self.high:.2f} in {self.pairs} pairs"


def paired(
    first: Callable[[], float], second: Callable[[], float], *, pairs: int
) -> Paired:
    """Call two measurements alternately; a first pair, unmeasured, fills the caches."""
    first()
    second()
    seen = [(first(), second()) for _ in range(pairs)]
    ratios = [one / other for one, other in seen]
    return Paired(
        first=statistics.median(one for one, _ in seen),
        second=statistics.median(other for _, other in seen),
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        pairs=pairs,
    )


def rss_bytes(pid: int) -> int:
    """Return the resident memory of a running process (proc_pid_status(5), VmRSS)."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"process {pid} has no resident memory")


@contextlib.contextmanager
def peak_memory(pid: int) -> Iterator[list[int]]:
    """Yield a list whose one item grows to the most memory a process and its children have had.

    It counts what is resident, and what stands in files that live in memory only; mkfs.erofs
    apart.
    """
    peak, ended = [0], threading.Event()

    def look() -> None:
        while not ended.wait(0.005):
            with contextlib.suppress(
                OSError, RuntimeError
            ):  # it ended between two looks
                family = sum(map(_own_rss, _family(pid)))
                peak[0] = max(peak[0], family + _memory_files(pid))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def _family(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


def _own_rss(pid: int) -> int:
    if Path(f"/proc/{pid}/comm").read_text() == "mkfs.erofs\n":
        return 0
    return rss_bytes(pid)


def _memory_files(pid: int) -> int:
    found = {}
    for path in Path(f"/proc/{pid}/fd").iterdir():
        if str(path.readlink()).startswith("/memfd:"):
            seen = path.stat()
            found[seen.st_ino] = seen.st_blocks * 512
    return sum(found.values())
