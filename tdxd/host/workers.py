"""Worker processes that share the work on ranges of payload blocks.

Threads would not do: the interpreter lock serialises the many short calls per block. Workers
are exec'd, not forked, in a session of their own; they inherit the descriptors named here,
and get their key through a pipe. Whatever happens, leaving the `with` block leaves none.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import selectors
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import IO, Self

import msgpack

import tdxd
from tdxd.errors import HostError, IntegrityError, TdxdError
from tdxd.host.range_worker import FRAME_PREFIX_BYTES, Task, frame

__all__ = ["RANGE_BLOCKS", "Workers", "cancelled_error", "never"]

RANGE_BLOCKS = 1024
"""4 MiB; a multiple of the 128 digests in a hash block, so that no two ranges share one."""
_QUEUE_RANGES = 2
"""How many ranges a worker holds: one in work, and one so that it never waits for `done`."""
_POLL_S = 0.1
_END_TIMEOUT_S = 5.0
_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from tdxd.host.range_worker import main; main()"
)


def never() -> bool:
    """Say that nobody cancels."""
    return False


def cancelled_error(what: str) -> TdxdError:
    """Return the error of work that its caller called off."""
    return HostError("work on", what, errno.ECANCELED)


class Workers:
    """Some worker processes; a context manager.

    `what` names the file worked on in every error; `fds` are the descriptors they inherit.
    """

    def __init__(self, count: int, *, fds: Sequence[int], what: str) -> None:
        self._what = what
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for _ in range(count):
                self._processes.append(_start(tuple(fds)))
        except OSError as exc:
            self._kill()
            raise HostError.of("start a worker for", what, exc) from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._end()
        self._kill()

    def run(
        self,
        task: Task,
        *,
        blocks: int,
        cancelled: Callable[[], bool] = never,
        done: Callable[[int, int], None] | None = None,
    ) -> None:
        """Do the task on blocks 0 to `blocks`, in ranges of RANGE_BLOCKS, on all workers.

        `done` is told each finished range: its first block and its blocks.

        Raises: IntegrityError for a block that does not match or an input that ends early;
        HostError for reading, writing, a worker that ended, and when `cancelled` turns true.
        """
        waiting = collections.deque(range(0, blocks, RANGE_BLOCKS))
        running: list[collections.deque[int]] = [
            collections.deque() for _ in self._processes
        ]
        with selectors.DefaultSelector() as selector:
            for index, process in enumerate(self._processes):
                self._send(process, task.encode())
                selector.register(_stdout(process), selectors.EVENT_READ, index)
            for index in [*range(len(self._processes))] * _QUEUE_RANGES:
                self._feed(index, waiting, running[index], blocks)
            while any(running):
                if cancelled():
                    raise cancelled_error(self._what)
                for key, _ in selector.select(_POLL_S):
                    status, value = self._receive(self._processes[key.data])
                    self._check(status, value)
                    first = running[key.data].popleft()
                    self._feed(key.data, waiting, running[key.data], blocks)
                    if done is not None:
                        done(first, value)

    def _feed(
        self,
        index: int,
        waiting: collections.deque[int],
        running: collections.deque[int],
        blocks: int,
    ) -> None:
        if waiting:
            first = waiting.popleft()
            running.append(first)
            count = min(RANGE_BLOCKS, blocks - first)
            self._send(self._processes[index], frame([first, count]))

    def _check(self, status: str, value: int) -> None:
        match status:
            case "done":
                pass
            case "bad":
                raise IntegrityError(
                    f"{self._what}: block {value} is not what was sealed",
                    hint="the file was damaged or tampered with; copy it again",
                )
            case "short":
                raise IntegrityError(
                    f"{self._what}: ends inside block {value}",
                    hint="the file is truncated; copy it again",
                )
            case _:
                raise HostError(status, self._what, value)

    def _send(self, process: subprocess.Popen[bytes], data: bytes) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(data)  # whole: it is shorter than PIPE_BUF
        except BrokenPipeError:
            raise self._ended(process) from None

    def _receive(self, process: subprocess.Popen[bytes]) -> tuple[str, int]:
        stdout = _stdout(process)
        prefix = _read_exactly(stdout, FRAME_PREFIX_BYTES)
        body = _read_exactly(stdout, int.from_bytes(prefix, "big"))
        if not body:
            raise self._ended(process)
        status, value = msgpack.unpackb(body)
        return status, value

    def _ended(self, process: subprocess.Popen[bytes]) -> HostError:
        process.kill()
        code = process.wait()
        hint = f"a worker process ended by itself, status {code}; is memory short?"
        return HostError("work on", self._what, errno.ECHILD, hint=hint)

    def _end(self) -> None:
        """Let the workers end by themselves."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_TIMEOUT_S)

    def _kill(self) -> None:
        """Kill and reap what is left, and close the pipes; harmless when repeated."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _start(fds: tuple[int, ...]) -> subprocess.Popen[bytes]:
    root = os.path.dirname(os.path.dirname(os.path.abspath(tdxd.__file__)))
    # Packages keep all modules in `root` and run without site: then so do the workers.
    isolated = "-IS" if sys.flags.no_site else "-I"
    # Popen's own pipes would stay open for ever if the second one cannot be had.
    with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
        their_in, our_in = os.pipe()
        theirs.callback(os.close, their_in)
        # Unbuffered: an answer must not wait in a buffer that select does not see.
        stdin = ours.enter_context(open(our_in, "wb", buffering=0))
        our_out, their_out = os.pipe()
        theirs.callback(os.close, their_out)
        stdout = ours.enter_context(open(our_out, "rb", buffering=0))
        process = subprocess.Popen(
            [sys.executable, isolated, "-c", _PROGRAM, root],
            stdin=their_in,
            stdout=their_out,
            pass_fds=fds,
            start_new_session=True,
        )
        ours.pop_all()
    process.stdin, process.stdout = stdin, stdout
    return process


def _stdout(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdout is not None
    return process.stdout


def _read_exactly(pipe: IO[bytes], size: int) -> bytes:
    """Read `size` bytes, or what there is before the end."""
    data = b""
    while len(data) < size and (more := pipe.read(size - len(data))):
        data += more
    return data
