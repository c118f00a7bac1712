"""Replaces this program by the one now on disk, in the same process, by execve(2).

The process id, the children, the namespaces and the descriptors named stay. The state goes by a
memory file whose number stands in one environment variable, next to the process id for which it
is meant, as systemd does it with LISTEN_PID.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import NoReturn

from tdxd.errors import HostError

__all__ = [
    "SIGNALS",
    "Inherited",
    "Program",
    "held_signals",
    "replace",
    "take",
    "this_program",
]

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""What the daemon is told by; none of them may be lost over the exec."""
_VARIABLE = "TDXD_HANDOVER"
"""`PID:STATE:CAUGHT`: the process id, the memory file, and the end of a pair of sockets."""
_FIRST_FD = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A command line that starts this program anew. `env` is what it was started with."""

    path: str
    argv: tuple[str, ...]
    env: Mapping[str, str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Inherited:
    """What the program before this one left: its encoded state, and every open descriptor."""

    state: bytes
    fds: tuple[int, ...]

    def close(self, *, besides: frozenset[int]) -> None:
        """Close every descriptor that is not named; harmless for those closed already."""
        for fd in self.fds:
            if fd not in besides:
                with contextlib.suppress(OSError):
                    os.close(fd)


def this_program() -> Program:
    """Return how this program was started; call it before the environment is changed.

    A script is executed itself, since a new version may name another interpreter; `python -m`
    is repeated as it was.
    """
    script = os.path.abspath(sys.argv[0])
    env = dict(os.environ)
    if _is_script(script):
        return Program(path=script, argv=(script, *sys.argv[1:]), env=env)
    return Program(path=sys.executable, argv=tuple(sys.orig_argv), env=env)


def _is_script(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return os.access(path, os.X_OK) and file.read(2) == b"#!"
    except OSError:
        return False


# --- before the exec ------------------------------------------------------------


@contextlib.contextmanager
def held_signals() -> Iterator[int]:
    """Hold `SIGNALS` back: they come when this ends, or stay pending over an exec.

    Blocking them in this thread leaves the other threads, in which Python's C handler only
    notes them down for later: an exec would forget them. But it writes each number to the
    wakeup descriptor at once; the yielded descriptor reads them and goes to the next program.
    Source: `signal.set_wakeup_fd` of Python.
    """
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    reader.setblocking(False)
    writer.setblocking(False)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield reader.fileno()
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        reader.close()
        writer.close()


def replace(
    program: Program, *, state: bytes, fds: Iterable[int], caught_fd: int
) -> NoReturn:
    """Execute `program` in the place of this one, inside `held_signals`; `fds` stay open.

    Raises: HostError, and everything is as before.
    """
    memory_fd = -1
    kept: list[int] = []
    try:
        memory_fd = os.memfd_create("tdxd:handover", os.MFD_CLOEXEC)
        with open(memory_fd, "wb", closefd=False) as file:
            file.write(state)
        _close_on_exec()
        for fd in (memory_fd, caught_fd, *fds):
            os.set_inheritable(fd, True)
            kept.append(fd)
        note = f"{os.getpid()}:{memory_fd}:{caught_fd}"
        sys.stderr.flush()
        env = {**program.env, _VARIABLE: note}
        os.execve(program.path, program.argv, env)  # noqa: S606 — no shell is wanted
    except OSError as exc:
        raise HostError.of("execute", program.path, exc) from exc
    finally:
        for fd in kept:
            os.set_inheritable(fd, False)
        if memory_fd >= 0:
            os.close(memory_fd)


def _close_on_exec() -> None:
    """Leave nothing open that is not named, whatever a library did with its descriptors."""
    for fd in _open_fds():
        with contextlib.suppress(OSError):  # the descriptor of the listing itself
            os.set_inheritable(fd, False)


def _open_fds() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/fd") if int(name) >= _FIRST_FD]


# --- after the exec -------------------------------------------------------------


def take() -> Inherited | None:
    """Return what the program before this one left; `None` at a fresh start.

    From here on no child inherits any of it. State that cannot be read is empty.
    """
    pid, _, numbers = os.environ.pop(_VARIABLE, "").partition(":")
    state_fd, _, caught_fd = numbers.partition(":")
    if pid != str(os.getpid()):
        return None
    fds = []
    for fd in _open_fds():
        with contextlib.suppress(OSError):
            if os.get_inheritable(fd):  # what this interpreter opened is not
                os.set_inheritable(fd, False)
                fds.append(fd)
    try:
        _raise_again(int(caught_fd))
        state = _read(int(state_fd))
    except (OSError, ValueError):
        state = b""
    return Inherited(state=state, fds=tuple(fds))


def _raise_again(caught_fd: int) -> None:
    """Send this process each signal that another thread of the last program caught."""
    with socket.socket(fileno=caught_fd) as caught:
        numbers = caught.recv(4096)
    for number in set(numbers) & set(SIGNALS):
        os.kill(os.getpid(), number)


def _read(state_fd: int) -> bytes:
    with open(state_fd, "rb") as file:
        file.seek(0)
        return file.read()
