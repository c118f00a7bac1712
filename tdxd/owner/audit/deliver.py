"""Hands a few bytes to a command or to an address, within a bounded time."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import ssl
import subprocess
import threading
import urllib.parse
from collections.abc import Iterator, Sequence

from tdxd.errors import UnavailableError

__all__ = ["post", "run_command"]

_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
_SAID_MAX = 200


def run_command(argv: Sequence[str], data: bytes, timeout_s: float) -> None:
    """Run a command with `data` on its standard input; it is killed when the time is over.

    Raises: UnavailableError if it cannot be started, fails or takes too long.
    """
    try:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=_ENVIRONMENT,
            start_new_session=True,
        )
    except (OSError, ValueError) as exc:
        raise UnavailableError(f"{argv[0]}: {exc}") from exc
    with child:
        try:
            _, said = child.communicate(data, timeout=timeout_s)
        except subprocess.TimeoutExpired as exc:
            raise UnavailableError(
                f"{argv[0]} takes longer than {timeout_s:g} s"
            ) from exc
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # and what it started
    if child.returncode:
        last = said.decode(errors="replace").strip()[-_SAID_MAX:]
        raise UnavailableError(f"{argv[0]} exited with {child.returncode}: {last!r}")


def post(url: str, data: bytes, content_type: str, timeout_s: float) -> None:
    """Send `data` to an address by POST; redirects and proxies are not followed.

    Raises: UnavailableError unless the answer is a status from 200 to 299, in time.
    """
    parts = urllib.parse.urlsplit(url)
    path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    try:
        connection = _connection(parts, timeout_s)
        with contextlib.closing(connection), _cut(connection, timeout_s):
            headers = {"Content-Type": content_type, "Connection": "close"}
            connection.request("POST", path, body=data, headers=headers)
            status = connection.getresponse().status
    except (OSError, http.client.HTTPException, ValueError) as exc:
        raise UnavailableError(f"{url}: {exc or type(exc).__name__}") from exc
    if not 200 <= status < 300:
        raise UnavailableError(f"{url}: HTTP status {status}")


def _connection(
    parts: urllib.parse.SplitResult, timeout_s: float
) -> http.client.HTTPConnection:
    host = parts.hostname or ""
    if parts.scheme == "https":
        context = ssl.create_default_context()
        made: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, parts.port, timeout=timeout_s, context=context
        )
    else:
        made = http.client.HTTPConnection(host, parts.port, timeout=timeout_s)
    made.connect()
    return made


@contextlib.contextmanager
def _cut(connection: http.client.HTTPConnection, timeout_s: float) -> Iterator[None]:
    """Shut the connection down when the time is over: a socket's timeout is for each read."""
    sock = connection.sock

    def shut() -> None:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(timeout_s, shut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
