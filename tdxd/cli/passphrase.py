"""Gets a passphrase from a descriptor, a file or the terminal: never from arguments.

It is taken as it is, byte for byte: a newline at its end counts, but for the one that ends a
line typed on the terminal. Imports little: `tdxctl` must start fast.
"""

from __future__ import annotations

import contextlib
import os
import sys

from tdxd.errors import HostError, UsageError

TYPE_CHECKING = False  # typing itself would cost tdxctl a fifth of its start
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "MAX_BYTES",
    "asked_on_terminal",
    "from_fd",
    "from_file",
    "has_terminal",
    "hide_memory",
]

MAX_BYTES = 512
"""`core.foreign.PASSPHRASE_MAX_BYTES`, without what that imports."""
_TERMINAL = "/dev/tty"
_PR_SET_DUMPABLE = 4


def from_fd(fd: int) -> bytes:
    """Read a descriptor to its end.

    Raises: UsageError for none, nothing or too much; HostError.
    """
    what = f"descriptor {fd}"
    hide_memory()
    try:
        data = b"".join(_chunks(fd))
    except (OSError, OverflowError) as exc:
        hint = "in a shell: --passphrase-fd 3 3< FILE"
        problem = exc.strerror if isinstance(exc, OSError) else "no such number"
        raise UsageError(f"{what}: {problem}", hint=hint) from exc
    return _checked(data, what)


def from_file(path: str) -> bytes:
    """Read a file.

    Raises: UsageError for nothing or too much; HostError.
    """
    hide_memory()
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise HostError.of("open", path, exc) from exc
    try:
        data = b"".join(_chunks(fd))
    except OSError as exc:
        raise HostError.of("read", path, exc) from exc
    finally:
        os.close(fd)
    return _checked(data, path)


def has_terminal() -> bool:
    """Say whether there is somebody to ask."""
    try:
        os.close(os.open(_TERMINAL, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def asked_on_terminal(what: str) -> bytes:
    """Ask for the passphrase of something on the terminal, which does not show what is typed.

    Raises: UsageError without a terminal, for nothing or too much; HostError.
    """
    hide_memory()
    try:
        fd = os.open(_TERMINAL, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as exc:
        hint = "give it by --passphrase-fd"
        raise UsageError("no terminal to ask for a passphrase on", hint=hint) from exc
    try:
        with _terminal_errors():
            typed = _line_without_echo(fd, f"Passphrase of {what}: ".encode())
    finally:
        os.close(fd)
    return _checked(typed.removesuffix(b"\n"), "what was typed")


def _line_without_echo(fd: int, prompt: bytes) -> bytes:
    import termios

    before = termios.tcgetattr(fd)
    silent = termios.tcgetattr(fd)
    silent[3] &= ~termios.ECHO
    try:
        termios.tcsetattr(fd, termios.TCSAFLUSH, silent)
        os.write(fd, prompt)
        return os.read(fd, 4096)  # a line: what the kernel's own editing holds at most
    finally:
        termios.tcsetattr(fd, termios.TCSAFLUSH, before)
        os.write(fd, b"\n")


@contextlib.contextmanager
def _terminal_errors() -> Iterator[None]:
    """Raise HostError for what the terminal refuses: termios has an error of its own."""
    import termios

    try:
        yield
    except OSError as exc:
        raise HostError.of("ask on", _TERMINAL, exc) from exc
    except termios.error as exc:
        raise HostError("ask on", _TERMINAL, exc.args[0]) from exc


def _chunks(fd: int) -> Iterator[bytes]:
    """Yield what a descriptor holds, no more than tells that it is too much."""
    left = MAX_BYTES + 1
    while left and (data := os.read(fd, left)):
        left -= len(data)
        yield data


def _checked(data: bytes, source: str) -> bytes:
    if not data:
        raise UsageError(f"{source}: the passphrase is empty")
    if len(data) > MAX_BYTES:
        raise UsageError(f"{source}: the passphrase is longer than {MAX_BYTES} bytes")
    if data.endswith(b"\n"):
        text = f"{source}: the passphrase ends in a newline, which counts"
        print(f"warning: {text}; printf writes none", file=sys.stderr)
    return data


def hide_memory() -> None:
    """Keep this process out of core dumps and other processes' eyes (prctl(2))."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
