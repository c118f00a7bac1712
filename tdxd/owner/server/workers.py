"""Worker processes that share one port, and the parent that keeps them running.

dcap-qvl holds the interpreter lock, so each further core takes a process; and it is the one part
that could end its process on hostile bytes, so it is never run where nobody would notice. The
parent holds no secret and listens on nothing: it reserves the port, starts the workers by exec,
starts one again that ended, and ends them when it is told to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import IO, Any

import structlog

import tdxd
from tdxd.core.config import Address
from tdxd.errors import EX_OSERR, ConfigError, DataError, HostError, TdxdError
from tdxd.owner.server.metrics import Totals

__all__ = ["Supervisor", "WorkerFailedError", "reserve_port", "worker_command"]

_log: structlog.stdlib.BoundLogger = structlog.get_logger()

_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from tdxd.owner.server.worker import main; sys.exit(main(sys.argv[2:]))"
)
_START_S = 60.0
_STOP_S = 10.0
_READ_BYTES = 65536
_LINE_MAX_BYTES = 1024 * 1024
_PAUSE_MIN_S = 0.2
_PAUSE_MAX_S = 30.0
_LIVED_S = 60.0
"""A worker that ran so long starts again at once; one that did not, after a growing pause."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


class WorkerFailedError(TdxdError):
    """A worker process did not start."""

    code = "worker"
    exit_code = EX_OSERR


class _ToldToEndError(Exception):
    """A signal came while workers were starting."""


def worker_command(*arguments: str) -> list[str]:
    """Return how a worker is started: by this interpreter, from this very source tree."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(tdxd.__file__)))
    # Packages keep all modules in `root` and run without site: then so do the workers.
    isolated = "-IS" if sys.flags.no_site else "-I"
    return [sys.executable, isolated, "-c", _PROGRAM, root, *arguments]


@contextlib.contextmanager
def reserve_port(address: Address) -> Iterator[Address]:
    """Hold a port without listening on it; yields the address with its number.

    A port that somebody else listens on is found here: sharing must not hide it.

    Raises: HostError.
    """
    try:
        family, _, _, _, found = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found)
        with socket.socket(family, socket.SOCK_STREAM) as held:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.bind(found)
            yield Address(address.host, held.getsockname()[1])
    except OSError as exc:
        hint = "is the port in use?"
        raise HostError.of("listen on", str(address), exc, hint=hint) from exc


@dataclasses.dataclass(slots=True, kw_only=True)
class _Worker:
    """One process; `ready` once it listens."""

    process: subprocess.Popen[bytes]
    started_s: float
    ready: bool = False
    silent: bool = False
    """Nothing more will come from it."""
    heard: bytes = b""

    @property
    def stdout(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout


class Supervisor:
    """Keeps `count()` workers running; `run` it in the main thread."""

    def __init__(
        self,
        command: Callable[[int], Sequence[str]],
        count: Callable[[], int],
        *,
        environment: Mapping[str, str],
        on_ready: Callable[[int], None],
        on_end: Callable[[], None],
        totals: Totals,
    ) -> None:
        self._command = command
        self._count = count
        self._environment = dict(environment)
        self._on_ready = on_ready
        self._on_end = on_end
        self._totals = totals
        self._working: list[_Worker] = []
        self._coming: list[_Worker] = []
        self._pause_s = 0.0
        self._again_s = 0.0
        self._wanted = 0
        self._kept: set[int] = set()
        """Signals that came while workers were starting, for the next step."""

    def run(self) -> None:
        """Run until SIGTERM or SIGINT; SIGHUP starts new workers, then ends the old ones.

        Raises: TdxdError if the first workers do not start.
        """
        with _signals() as caught:
            try:
                with contextlib.suppress(_ToldToEndError):
                    self._working = self._start_all(caught)
                    self._on_ready(len(self._working))
                    while self._step(caught):
                        pass
                self._on_end()
            finally:
                self._end([*self._working, *self._coming])

    def _step(self, caught: socket.socket) -> bool:
        """Wait for something to happen and do what it takes; False when it is time to end."""
        kept, self._kept = self._kept, set()
        numbers = kept | self._wait(caught, 0.0 if kept else self._patience_s())
        if numbers & {signal.SIGTERM, signal.SIGINT}:
            return False
        if signal.SIGHUP in numbers:
            self._reload(caught)
        gone = [one for one in self._working if one.process.poll() is not None]
        for one in gone:
            self._bury(one)
        missing = self._wanted - len(self._working)
        if missing > 0 and time.monotonic() >= self._again_s:
            self._working += [self._start() for _ in range(missing)]
        return True

    def _patience_s(self) -> float | None:
        if len(self._working) >= self._wanted:
            return None
        return max(0.0, self._again_s - time.monotonic())

    def _bury(self, worker: _Worker) -> None:
        self._working.remove(worker)
        self._totals.restarts += 1
        self._close(worker)
        lived_s = time.monotonic() - worker.started_s
        grown_s = min(_PAUSE_MAX_S, max(_PAUSE_MIN_S, 2 * self._pause_s))
        self._pause_s = 0.0 if lived_s >= _LIVED_S else grown_s
        self._again_s = time.monotonic() + self._pause_s
        _log.error(
            "worker.ended",
            pid=worker.process.pid,
            status=worker.process.returncode,
            again_in_s=self._pause_s,
        )

    def _reload(self, caught: socket.socket) -> None:
        before = self._wanted
        try:
            self._coming = self._start_all(caught)
        except TdxdError as exc:
            self._wanted = before
            _log.error("reload.failed", error=exc.message, hint=exc.hint)
            return
        old, self._working, self._coming = self._working, self._coming, []
        self._end(old)
        self._on_ready(len(self._working))

    def _start_all(self, caught: socket.socket) -> list[_Worker]:
        """Start a whole set of workers and wait until all listen.

        Raises: TdxdError, _ToldToEndError; then none of them is left.
        """
        self._wanted = self._count()
        made: list[_Worker] = []
        limit_s = time.monotonic() + _START_S
        try:
            made += [self._start() for _ in range(self._wanted)]
            while not all(one.ready for one in made):
                left_s = limit_s - time.monotonic()
                if left_s <= 0:
                    text = f"workers did not start within {_START_S:g} s"
                    raise WorkerFailedError(text)
                self._kept |= self._wait(caught, left_s, made)
                if self._kept & {signal.SIGTERM, signal.SIGINT}:
                    raise _ToldToEndError
        except BaseException:
            self._end(made)
            raise
        return made

    def _start(self) -> _Worker:
        process = subprocess.Popen(
            self._command(self._wanted),
            bufsize=0,
            stdin=subprocess.PIPE,  # its end tells the worker that this process is gone
            stdout=subprocess.PIPE,
            env=self._environment,
            start_new_session=True,  # Ctrl-C is for this process alone
        )
        return _Worker(process=process, started_s=time.monotonic())

    def _wait(
        self,
        caught: socket.socket,
        timeout_s: float | None,
        starting: Sequence[_Worker] = (),
    ) -> set[int]:
        """Return the signals that came; hear what starting workers say.

        Raises: TdxdError for a worker that says or shows that it cannot start.
        """
        everybody = (*self._working, *self._coming, *starting)
        talking = {one.stdout.fileno(): one for one in everybody if not one.silent}
        fds = [caught.fileno(), *talking]
        found, _, _ = select.select(fds, [], [], timeout_s)
        for fd in found:
            if fd in talking:
                self._hear(talking[fd], strict=talking[fd] in starting)
        return set(caught.recv(4096)) if caught.fileno() in found else set()

    def _hear(self, worker: _Worker, *, strict: bool) -> None:
        data = os.read(worker.stdout.fileno(), _READ_BYTES)
        *lines, worker.heard = (worker.heard + data).split(b"\n")
        for line in lines:
            if worker.ready:
                self._add_counts(worker, line)
            else:
                self._started(worker, json.loads(line), strict=strict)
        if not data or len(worker.heard) > _LINE_MAX_BYTES:
            worker.silent = True
            if strict and not worker.ready:
                status = worker.process.wait(_STOP_S)
                raise WorkerFailedError(f"a worker ended at its start, status {status}")

    def _add_counts(self, worker: _Worker, line: bytes) -> None:
        try:
            self._totals.hear(worker.process.pid, line)
        except DataError as exc:
            _log.warning("worker.misheard", pid=worker.process.pid, error=exc.message)

    def _started(self, worker: _Worker, said: dict[str, Any], *, strict: bool) -> None:
        worker.ready = True
        if "error" in said and strict:
            raise _failure(said)
        if "error" in said:
            _log.error("worker.failed", error=said["error"], hint=said["hint"])
        elif not strict:
            _log.info("worker.started", pid=worker.process.pid)

    def _end(self, workers: Sequence[_Worker]) -> None:
        """End workers in order, then by force, and reap them."""
        for one in workers:
            one.process.terminate()
        limit_s = time.monotonic() + _STOP_S
        for one in workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.process.wait(max(0.0, limit_s - time.monotonic()))
            one.process.kill()
            self._close(one)

    def _close(self, worker: _Worker) -> None:
        worker.process.wait()
        self._last_words(worker)
        for pipe in (worker.process.stdin, worker.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _last_words(self, worker: _Worker) -> None:
        """Hear what an ended worker had still to tell; a child of it may hold the pipe open."""
        os.set_blocking(worker.stdout.fileno(), False)
        with contextlib.suppress(BlockingIOError, TdxdError):
            while not worker.silent:
                self._hear(worker, strict=False)
        self._totals.forget(worker.process.pid)


def _failure(said: Mapping[str, Any]) -> TdxdError:
    kinds: dict[int, type[TdxdError]] = {
        kind.exit_code: kind for kind in (ConfigError, DataError)
    }
    kind = kinds.get(said["code"], WorkerFailedError)
    return kind(said["error"], hint=said["hint"])


@contextlib.contextmanager
def _signals() -> Iterator[socket.socket]:
    """Turn signals into bytes that a select() sees; one byte is the signal's number."""
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        before = {one: signal.signal(one, _noted) for one in _SIGNALS}
        woken = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield reader
        finally:
            signal.set_wakeup_fd(woken)
            for one, handler in before.items():
                signal.signal(one, handler)


def _noted(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: the number stands in the wake-up socket."""
