"""`tdx-infer bench`: closed and open loops of clients, each with a connection of its own.

Every client sends the same request, serialised once. In a closed loop it waits for the answer
before it sends the next; in an open loop requests are due at a given rate, and latency counts from
when a request was due: a server that stalls does not hide what waits meanwhile. Connecting and the
first requests are a warm-up of their own and stand in no figure. A call that fails counts under its
gRPC code and ends nothing.
"""

from __future__ import annotations

import array
import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tdxd.user.endpoint import Endpoint
from tdxd.user.load import Load
from tdxd.user.load_client import CLOCK, Call
from tdxd.user.load_processes import LoadProcesses

__all__ = ["PERCENTILES", "Load", "Query", "Report", "percentile", "run_bench"]

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One call: which client, its how manieth, how long, and the gRPC code's name (or OK).

    In an open loop it is the how manieth of all, and its latency counts from when it was due.
    """

    task: int
    loop: int
    latency_s: float
    ended_s: float
    """When the answer was there, on the clock of `time.monotonic`."""
    code: str
    late_s: float = 0.0
    """How long after it was due it was sent; in a closed loop nothing is due."""

    def line(
        self, batch: int, *, channel: str = "secure", endless: bool = False
    ) -> str:
        """Return the reference's line for this call; an endless run has no loop_idx."""
        loop = "" if endless else f"loop_idx {self.loop}, "
        return (
            f"query: {channel} channel, task {self.task}, batch {batch}, {loop}"
            f"latency(ms) {self.latency_s * 1000:.1f}, "
            f"tps: {batch / self.latency_s if self.latency_s else math.inf:.1f}"
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a run gave: calls that succeeded, failures by code, the time of all of it."""

    load: Load
    latencies_s: Sequence[float]
    errors: Mapping[str, int]
    elapsed_s: float
    warm_up_s: float
    client_cpu_s: float
    ended_s: Sequence[float] = ()
    """For each latency, how long after the start the answer was there."""
    late_s: Sequence[float] = ()
    """For each call of an open loop, how long after it was due it was sent."""
    lost: int = 0
    """Requests without an answer when the run was interrupted."""
    interrupted: bool = False

    @property
    def requests(self) -> int:
        """How many calls ended, well or not."""
        return len(self.latencies_s) + sum(self.errors.values())

    @property
    def requests_per_s(self) -> float:
        """Answered requests per second."""
        return len(self.latencies_s) / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def rows_per_s(self) -> float:
        """Rows of answered requests per second."""
        return self.requests_per_s * self.load.batch

    def average_s(self) -> float:
        """Return the mean latency; nan without a success."""
        count = len(self.latencies_s)
        return sum(self.latencies_s) / count if count else math.nan

    def late_ms(self) -> float | None:
        """Return how late 99 of 100 calls were sent at most; None in a closed loop."""
        if not self.late_s:
            return None
        return percentile(sorted(self.late_s), 99.0) * 1000

    def lines(self) -> list[str]:
        """Return the reference's summary line, then percentiles, then errors by code."""
        load, average_ms = self.load, self.average_s() * 1000
        made = [
            (
                f"summary: cnum {load.clients}, batch {load.batch}, "
                f"e2e time(s) {self.elapsed_s}, average latency(ms) {average_ms}, "
                f"tps: {self.rows_per_s}"
            )
        ]
        if self.latencies_s:
            shown = " ".join(
                f"{name} {value:.1f}" for name, value in self.spread_ms().items()
            )
            made.append(f"latency(ms): {shown}")
        late_ms = self.late_ms()
        if late_ms is not None:
            made.append(
                f"rate: wanted {self.load.rate:g}/s, answered {self.requests_per_s:.1f}/s, "
                f"sent late(ms): p99 {late_ms:.1f}"
            )
        shown = ", ".join(f"{code} {n}" for code, n in sorted(self.errors.items()))
        made.append(f"errors: {shown or 'none'}")
        if self.interrupted:
            made.append(f"interrupted: {self.lost} requests had no answer yet")
        return made

    def spread_ms(self) -> dict[str, float]:
        """Return minimum, percentiles and maximum in milliseconds; empty without a success."""
        if not self.latencies_s:
            return {}
        ordered = sorted(self.latencies_s)
        made = {"min": ordered[0] * 1000}
        for share in PERCENTILES:
            made[f"p{share:g}"] = percentile(ordered, share) * 1000
        made["max"] = ordered[-1] * 1000
        return made

    def as_json(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        average_ms = self.average_s() * 1000
        return {
            **dataclasses.asdict(self.load),
            "requests": len(self.latencies_s),
            "errors": dict(sorted(self.errors.items())),
            "elapsed_s": self.elapsed_s,
            "warm_up_s": self.warm_up_s,
            "client_cpu_s": self.client_cpu_s,
            "requests_per_s": self.requests_per_s,
            "rows_per_s": self.rows_per_s,
            "average_ms": average_ms if self.latencies_s else None,
            "latency_ms": self.spread_ms(),
            "sent_late_p99_ms": self.late_ms(),
            "interrupted": self.interrupted,
            "lost": self.lost,
        }


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` percent of the values do not exceed.

    `ordered` is sorted and not empty (nearest rank: always a value that was measured).
    """
    rank = math.ceil(round(share * len(ordered) / 100, 9))
    return ordered[max(rank, 1) - 1]


def _never() -> bool:
    return False


def run_bench(
    endpoint: Endpoint,
    load: Load,
    request: bytes,
    *,
    on_query: Callable[[Query], None],
    on_warm: Callable[[float], None],
    on_answer: Callable[[bytes], None] | None = None,
    stopped: Callable[[], bool] = _never,
) -> Report:
    """Run the load; `on_query` sees every call while the others go on.

    `on_answer` gets an encoded answer of the warm-up. When `stopped` turns true, the run ends soon,
    and the report is on what there was until then.

    Raises: the error of a warm-up call that fails: nothing is measured then; KeyboardInterrupt if
    it was stopped before anything was measured.
    """
    started_s = CLOCK()
    with LoadProcesses(endpoint, load, request) as processes:
        answer = processes.warm_up(stopped)
        if answer is None:
            raise KeyboardInterrupt
        warm_up_s = CLOCK() - started_s
        on_warm(warm_up_s)
        if on_answer is not None:
            on_answer(answer)
        tally = _Tally(load)
        for start_s, call in processes.calls(stopped):
            if call is not None:
                on_query(tally.add(start_s, call))
        return tally.report(
            warm_up_s=warm_up_s,
            client_cpu_s=processes.cpu_s,
            lost=processes.lost,
            interrupted=stopped(),
        )


class _Tally:
    """Figures of the calls so far; plain numbers, since a run may be long."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._latencies_s = array.array("d")
        self._ended_s = array.array("d")
        self._late_s = array.array("d")
        self._errors: collections.Counter[str] = collections.Counter()
        self._elapsed_s = 0.0

    def add(self, start_s: float, call: Call) -> Query:
        """Count one call."""
        task, number, due_s, sent_s, ended_s, code = call
        latency_s = ended_s - due_s
        if code == "OK":
            self._latencies_s.append(latency_s)
            self._ended_s.append(ended_s - start_s)
        else:
            self._errors[code] += 1
        if self._load.rate is not None:
            self._late_s.append(sent_s - due_s)
        self._elapsed_s = max(self._elapsed_s, ended_s - start_s)
        return Query(
            task=task,
            loop=number,
            latency_s=latency_s,
            ended_s=ended_s,
            code=code,
            late_s=sent_s - due_s,
        )

    def report(
        self, *, warm_up_s: float, client_cpu_s: float, lost: int, interrupted: bool
    ) -> Report:
        """Return the figures."""
        return Report(
            load=self._load,
            latencies_s=self._latencies_s,
            errors=dict(self._errors),
            elapsed_s=self._elapsed_s,
            warm_up_s=warm_up_s,
            client_cpu_s=client_cpu_s,
            ended_s=self._ended_s,
            late_s=self._late_s,
            lost=lost,
            interrupted=interrupted,
        )
