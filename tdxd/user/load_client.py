"""The process that makes load: its clients, their connections, and the time each call takes.

It is told what to do through an inherited socket, and answers through it: first how the warm-up
went, then the calls as they end, then what it cost. It stops when told to, or when the other end
is gone. What is shown of a run is shown by another process, which therefore disturbs no figure.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import os
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import grpc

from tdxd.errors import TdxdError
from tdxd.host import tf_messages
from tdxd.user.endpoint import Endpoint, call_error, open_channel
from tdxd.user.load import Load, due_times_s

__all__ = ["CLOCK", "Call", "Ended", "Job", "Warm", "main"]

CLOCK = time.monotonic
"""One clock for all processes of a machine (clock_gettime(2), CLOCK_MONOTONIC)."""

_REPORT_S = 0.1
_FLIGHT_BYTES = 256 << 20
_FLIGHT_CALLS = 4096
"""How much an open loop may have on its way, in each process, so that memory lasts."""

Call = tuple[int, int, float, float, float, str]
"""One call: client, number, when it was due, was sent and had ended (CLOCK), gRPC code or OK."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one process does."""

    endpoint: Endpoint
    load: Load
    process: int
    request: bytes = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Warm:
    """All connections stand and the first requests are answered; or why not."""

    error: TdxdError | None
    answer: bytes = dataclasses.field(repr=False)
    """The last one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """All calls were reported. `lost` had no answer when the process was told to stop."""

    cpu_s: float
    lost: int


def main() -> None:
    """Do the job that comes through the descriptor in the first argument."""
    with Connection(int(sys.argv[2])) as other, contextlib.suppress(EOFError, OSError):
        _Client(other, other.recv()).run()
    # Calls without an answer must not hold this process up: nobody waits for them.
    os._exit(0)


class _Client:
    """The connections of this process, and the calls that ended since the last report."""

    def __init__(self, other: Connection, job: Job) -> None:
        self._other, self._job, self._load = other, job, job.load
        self._tasks = job.load.tasks(job.process)
        self._channels = [open_channel(job.endpoint) for _ in self._tasks]
        # Bytes in, bytes out: nothing is encoded or decoded while time is taken.
        self._calls: list[Any] = [
            channel.unary_unary(tf_messages.PREDICT_METHOD)
            for channel in self._channels
        ]
        self._ended: collections.deque[Call] = collections.deque()
        self._sent = (
            itertools.count()
        )  # which counts for several threads, without a lock
        self._stop = threading.Event()
        self._start_s = 0.0

    def run(self) -> None:
        """Warm up, wait for the time to start, then work and report."""
        self._other.send(self._warm_up())
        self._start_s = self._other.recv()
        threading.Thread(target=self._wait_for_stop, daemon=True).start()
        self._stop.wait(max(self._start_s - CLOCK(), 0))
        cpu_s = time.process_time()
        loops = [self._open] if self._load.rate else self._closed_loops()
        threads = [threading.Thread(target=one, daemon=True) for one in loops]
        for thread in threads:
            thread.start()
        told = 0
        for thread in threads:
            while thread.is_alive() and not self._stop.is_set():
                thread.join(_REPORT_S)
                told += self._report()
        told += self._report()
        cpu_s = time.process_time() - cpu_s
        self._other.send(Ended(cpu_s=cpu_s, lost=next(self._sent) - told))

    def _wait_for_stop(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            self._other.recv()
        self._stop.set()

    def _report(self) -> int:
        calls = [self._ended.popleft() for _ in range(len(self._ended))]
        if calls:
            self._other.send(calls)
        return len(calls)

    def _warm_up(self) -> Warm:
        """Connect all clients at once, as they will call; the first error counts."""
        errors: list[TdxdError] = []
        answers: list[bytes] = [b""]

        def one(call: Any) -> None:
            try:
                for _ in range(self._load.warm_up):
                    answers[0] = self._sync(call)
            except grpc.RpcError as exc:
                errors.append(call_error(exc, self._job.endpoint))

        threads = [threading.Thread(target=one, args=(call,)) for call in self._calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return Warm(error=errors[0] if errors else None, answer=answers[0])

    def _sync(self, call: Any) -> bytes:
        answer: bytes = call(self._job.request, timeout=self._job.endpoint.timeout_s)
        return answer

    # --- closed: each client waits for its answer -----------------------------

    def _closed_loops(self) -> list[functools.partial[None]]:
        return [
            functools.partial(self._closed, task, call)
            for task, call in zip(self._tasks, self._calls, strict=True)
        ]

    def _closed(self, task: int, call: Any) -> None:
        load, end_s = self._load, float("inf")
        if load.duration_s is not None:
            end_s = self._start_s + load.duration_s
        numbers = itertools.count() if load.loops is None else range(load.loops)
        for number in numbers:
            sent_s = CLOCK()
            if sent_s >= end_s or self._stop.is_set():
                return
            next(self._sent)
            code = "OK"
            try:
                self._sync(call)
            except grpc.RpcError as exc:
                code = exc.code().name
            self._ended.append((task, number, sent_s, sent_s, CLOCK(), code))

    # --- open: each request is sent when it is due ----------------------------

    def _open(self) -> None:
        """Send each request at its time, and then wait for all answers.

        Where the sending itself falls behind, the time is still taken from when it was due.
        """
        load = self._load
        fitting = _FLIGHT_BYTES // (len(self._job.request) + 1)
        most = max(len(self._calls), min(fitting, _FLIGHT_CALLS))
        room = threading.Semaphore(most)
        for number, after_s in due_times_s(load, self._job.process):
            due_s = self._start_s + after_s
            self._stop.wait(max(due_s - CLOCK(), 0))
            while not room.acquire(timeout=_REPORT_S):
                if self._stop.is_set():
                    return
            if self._stop.is_set():
                return
            turn = number // load.processes % len(self._calls)
            next(self._sent)
            sent_s = CLOCK()
            future = self._calls[turn].future(
                self._job.request, timeout=self._job.endpoint.timeout_s
            )
            about = (self._tasks[turn], number, due_s, sent_s)
            future.add_done_callback(functools.partial(self._done, about, room))
        for _ in range(most):
            while not room.acquire(timeout=_REPORT_S):
                if self._stop.is_set():
                    return

    def _done(
        self,
        about: tuple[int, int, float, float],
        room: threading.Semaphore,
        future: Any,
    ) -> None:
        self._ended.append((*about, CLOCK(), future.code().name))
        room.release()
