"""What load a benchmark makes, and when each of its requests is due."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator

from tdxd.errors import UsageError

__all__ = ["ARRIVALS", "Load", "due_times_s"]

ARRIVALS = ("even", "poisson")
_SEED = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`clients` connections in `processes`, each `loops` requests of `batch` rows after `warm_up`.

    Without `rate` the loop is closed: each client sends when its last answer is there. With `rate`
    it is open: so many requests a second in all, whatever became of those before, each due at
    a time of its own, evenly spaced or as a Poisson process.
    `loops` None is without end; `duration_s` ends the sending, too.
    """

    clients: int
    loops: int | None
    batch: int
    warm_up: int
    processes: int = 1
    rate: float | None = None
    arrivals: str = "even"
    duration_s: float | None = None

    def __post_init__(self) -> None:
        if self.processes > self.clients:
            text = f"{self.processes} processes for {self.clients} clients"
            raise UsageError(text, hint="each process has at least one client")
        for name, value in (("rate", self.rate), ("duration", self.duration_s)):
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{name} {value} is not greater than 0")

    @property
    def requests(self) -> int | None:
        """How many requests there will be at most; None: no number is set."""
        return None if self.loops is None else self.loops * self.clients

    @property
    def endless(self) -> bool:
        """Whether only an interrupt ends it."""
        return self.loops is None and self.duration_s is None

    def tasks(self, process: int) -> range:
        """Return the numbers of the clients that one of the processes has."""
        return range(process, self.clients, self.processes)


def due_times_s(load: Load, process: int) -> Iterator[tuple[int, float]]:
    """Yield (request number of all, seconds after the start) of what a process has to send.

    Even spacing interleaves the processes. Poisson processes add up to one of the sum of rates.
    """
    assert load.rate is not None
    chance = random.Random(_SEED + process)  # noqa: S311 - a benchmark that can be repeated
    at_s = 0.0
    for number in itertools.count(process, load.processes):
        if load.arrivals == "poisson":
            at_s += chance.expovariate(load.rate / load.processes)
        else:
            at_s = number / load.rate
        if load.requests is not None and number >= load.requests:
            return
        if load.duration_s is not None and at_s >= load.duration_s:
            return
        yield number, at_s
