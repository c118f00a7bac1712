"""The processes that make a benchmark's load, as the process that shows it sees them.

They are exec'd in a session of their own, so that Ctrl-C reaches only the one that shows. What
they need, a client's private key among it, goes through a socket pair that nobody else has.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Self

import tdxd
from tdxd.errors import HostError
from tdxd.user.endpoint import Endpoint
from tdxd.user.load import Load
from tdxd.user.load_client import CLOCK, Call, Ended, Job, Warm

__all__ = ["LoadProcesses"]

_START_S = 0.02
"""Between the word to start and the start: all processes hear it in time."""
_POLL_S = 0.1
_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from tdxd.user.load_client import main; main()"
)


class LoadProcesses:
    """Some processes that make load; a context manager, which leaves none."""

    def __init__(self, endpoint: Endpoint, load: Load, request: bytes) -> None:
        self._load = load
        self._processes: list[subprocess.Popen[bytes]] = []
        self._others: list[Connection] = []
        self._ended: list[Ended] = []
        try:
            for number in range(load.processes):
                self._start(
                    Job(endpoint=endpoint, load=load, process=number, request=request)
                )
        except BaseException:
            self._kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._kill()

    @property
    def cpu_s(self) -> float:
        """Processor time of the calls, of all processes, once `calls` is through."""
        return sum(one.cpu_s for one in self._ended)

    @property
    def lost(self) -> int:
        """How many requests had no answer when the processes were told to stop."""
        return sum(one.lost for one in self._ended)

    def warm_up(self, stopped: Callable[[], bool]) -> bytes | None:
        """Wait until all are warm; return an answer, or None if `stopped` turned true.

        Raises: the error of a warm-up call; HostError.
        """
        answer = b""
        missing = list(self._others)
        while missing:
            if stopped():
                return None
            for other in self._ready(missing):
                warm: Warm = self._receive(other)
                if warm.error is not None:
                    raise warm.error
                answer = warm.answer
                missing.remove(other)
        return answer

    def calls(self, stopped: Callable[[], bool]) -> Iterator[tuple[float, Call | None]]:
        """Start all; yield (time of the start, call) as calls end, and None from time to time.

        `stopped` turning true ends it soon: calls without an answer are lost.

        Raises: HostError.
        """
        start_s = CLOCK() + _START_S
        for other in self._others:
            self._send(other, start_s)
        running, told = list(self._others), False
        while running:
            if stopped() and not told:
                told = True
                for other in running:
                    self._send(other, None)
            for other in self._ready(running):
                message = self._receive(other)
                if isinstance(message, Ended):
                    self._ended.append(message)
                    running.remove(other)
                    continue
                for call in message:
                    yield start_s, call
            yield start_s, None

    def _start(self, job: Job) -> None:
        root = os.path.dirname(os.path.dirname(os.path.abspath(tdxd.__file__)))
        # Packages keep all modules in `root` and run without site: then so do these.
        isolated = "-IS" if sys.flags.no_site else "-I"
        ours, theirs = socket.socketpair()
        with theirs:
            self._others.append(Connection(ours.detach()))
            number = theirs.fileno()
            argv = [sys.executable, isolated, "-c", _PROGRAM, root, str(number)]
            try:
                process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    pass_fds=[number],
                    start_new_session=True,
                )
            except OSError as exc:
                raise HostError.of("start", "a client process", exc) from exc
        self._processes.append(process)
        self._send(self._others[-1], job)

    def _ready(self, others: list[Connection]) -> list[Connection]:
        return [one for one in wait(others, _POLL_S) if isinstance(one, Connection)]

    def _send(self, other: Connection, message: object) -> None:
        try:
            other.send(message)
        except OSError as exc:
            raise self._died(other) from exc

    def _receive(self, other: Connection) -> Any:
        try:
            return other.recv()
        except (EOFError, OSError) as exc:
            raise self._died(other) from exc

    def _died(self, other: Connection) -> HostError:
        process = self._processes[self._others.index(other)]
        process.kill()
        hint = f"it ended by itself, status {process.wait()}; is memory short?"
        return HostError("make load in", "a client process", errno.ECHILD, hint=hint)

    def _kill(self) -> None:
        """End and reap what is left; harmless when repeated."""
        for other in self._others:
            other.close()
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
