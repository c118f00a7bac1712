"""`tdx-infer bench`: a closed loop of clients, each with a connection of its own.

Every client sends the same request, serialised once, and waits for the answer before it sends
the next. Connecting and the first requests are a warm-up of their own and stand in no figure.
A call that fails counts under its gRPC code and ends nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc

from tdxd.errors import TdxdError
from tdxd.host import tf_messages
from tdxd.user.endpoint import Endpoint, call_error, open_channel

__all__ = ["PERCENTILES", "Load", "Query", "Report", "percentile", "run_bench"]

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`clients` connections, each `loops` requests of `batch` rows after `warm_up` others."""

    clients: int
    loops: int
    batch: int
    warm_up: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One call: which client, its how manieth, how long, and the gRPC code's name (or OK)."""

    task: int
    loop: int
    latency_s: float
    ended_s: float
    """When the answer was there, on the clock of `time.perf_counter`."""
    code: str

    def line(self, batch: int) -> str:
        """Return the reference's line for this call."""
        return (
            f"query: secure channel, task {self.task}, batch {batch}, "
            f"loop_idx {self.loop}, latency(ms) {self.latency_s * 1000:.1f}, "
            f"tps: {batch / self.latency_s:.1f}"
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a run gave: calls that succeeded, failures by code, the time of all of it."""

    load: Load
    latencies_s: tuple[float, ...]
    errors: Mapping[str, int]
    elapsed_s: float
    warm_up_s: float
    client_cpu_s: float

    @property
    def rows_per_s(self) -> float:
        """Rows of answered requests per second."""
        return len(self.latencies_s) * self.load.batch / self.elapsed_s

    def average_s(self) -> float:
        """Return the mean latency; nan without a success."""
        count = len(self.latencies_s)
        return sum(self.latencies_s) / count if count else math.nan

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
        shown = ", ".join(f"{code} {n}" for code, n in sorted(self.errors.items()))
        made.append(f"errors: {shown or 'none'}")
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
            "rows_per_s": self.rows_per_s,
            "average_ms": average_ms if self.latencies_s else None,
            "latency_ms": self.spread_ms(),
        }


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` percent of the values do not exceed.

    `ordered` is sorted and not empty (nearest rank: always a value that was measured).
    """
    rank = math.ceil(round(share * len(ordered) / 100, 9))
    return ordered[max(rank, 1) - 1]


def run_bench(
    endpoint: Endpoint,
    load: Load,
    request: bytes,
    *,
    on_query: Callable[[Query], None],
    on_warm: Callable[[float], None],
) -> Report:
    """Run the load; `on_query` sees every call while the others go on.

    Raises: the error of a warm-up call that fails: nothing is measured then.
    """
    run = _Run(endpoint, load, request)
    threads = [
        threading.Thread(target=run.client, args=(task,), daemon=True)
        for task in range(load.clients)
    ]
    started_s = time.perf_counter()
    for thread in threads:
        thread.start()
    run.warm.wait()
    warm_up_s = time.perf_counter() - started_s
    if run.failures:
        raise run.failures[0]
    on_warm(warm_up_s)
    cpu_s, started_s = time.process_time(), time.perf_counter()
    run.start.wait()
    queries = _collect(run, on_query)
    cpu_s = time.process_time() - cpu_s
    return Report(
        load=load,
        latencies_s=tuple(one.latency_s for one in queries if one.code == "OK"),
        errors=collections.Counter(one.code for one in queries if one.code != "OK"),
        elapsed_s=max(one.ended_s for one in queries) - started_s,
        warm_up_s=warm_up_s,
        client_cpu_s=cpu_s,
    )


def _collect(run: _Run, on_query: Callable[[Query], None]) -> list[Query]:
    queries: list[Query] = []
    running = run.load.clients
    while running:
        query = run.queries.get()
        if query is None:
            running -= 1
            continue
        queries.append(query)
        on_query(query)
    return queries


class _Run:
    """What the clients share."""

    def __init__(self, endpoint: Endpoint, load: Load, request: bytes) -> None:
        self.endpoint, self.load, self.request = endpoint, load, request
        self.failures: list[TdxdError] = []
        self.queries: queue.SimpleQueue[Query | None] = queue.SimpleQueue()
        # All clients are warm; then all start at once. The last party is whoever runs the bench.
        self.warm = threading.Barrier(load.clients + 1)
        self.start = threading.Barrier(load.clients + 1)

    def client(self, task: int) -> None:
        """Be one client; whatever happens to it, nobody waits for it for ever."""
        try:
            self._calls(task)
        except BaseException:
            self.warm.abort()
            self.start.abort()
            raise
        finally:
            self.queries.put(None)

    def _calls(self, task: int) -> None:
        """Connect, warm up, wait for the others, then call and call."""
        with open_channel(self.endpoint) as channel:
            # Bytes in, bytes out: nothing is encoded or decoded while time is taken.
            call: Any = channel.unary_unary(tf_messages.PREDICT_METHOD)
            try:
                for _ in range(self.load.warm_up):
                    call(self.request, timeout=self.endpoint.timeout_s)
            except grpc.RpcError as exc:
                self.failures.append(call_error(exc, self.endpoint))
            self.warm.wait()
            if self.failures:
                return
            self.start.wait()
            for loop in range(self.load.loops):
                self.queries.put(self._query(call, task, loop))

    def _query(self, call: Any, task: int, loop: int) -> Query:
        code = "OK"
        started_s = time.perf_counter()
        try:
            call(self.request, timeout=self.endpoint.timeout_s)
        except grpc.RpcError as exc:
            code = exc.code().name
        ended_s = time.perf_counter()
        latency_s = ended_s - started_s
        return Query(
            task=task, loop=loop, latency_s=latency_s, ended_s=ended_s, code=code
        )
