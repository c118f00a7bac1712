"""One HTTP GET with bounds on everything: time as a whole, size, no redirect, no proxy.

`urllib` bounds each read of a socket, not the answer: a server that sends a byte now and then
would hold a thread for hours. Here a timer shuts the socket down when the time is over. Only the
resolver has limits of its own (resolv.conf(5), `timeout` and `attempts`).
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
import urllib.parse
from email.message import Message

from tdxd.core.showing import shown
from tdxd.errors import DataError, UnavailableError

__all__ = ["MAX_BYTES", "get"]

MAX_BYTES = 1024 * 1024
"""The largest answer; Intel's largest, a PCK CRL, has some ten thousand bytes."""
_CHUNK_BYTES = 65536
_HINTS = {
    404: "it has none for this family of platforms: is the FMSPC that of a TDX platform?",
    429: "it is asked too often; the next attempt comes by itself",
}
_REDIRECT_HINT = "redirects are not followed: name the final address in keyd.toml"


def get(
    url: str, *, stop_s: float, tls: ssl.SSLContext | None = None
) -> tuple[bytes, Message]:
    """Fetch one document before the monotonic time `stop_s`; return it and its headers.

    `tls` is used for https; by default the system's CAs are trusted.

    Raises: UnavailableError, naming the address and the reason; DataError for too large an answer.
    """
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    secure = parts.scheme == "https"
    try:
        plain = _connect(host, parts.port or (443 if secure else 80), stop_s)
        with plain, plain.dup() as other_end, _Cut(other_end, stop_s):
            if not secure:
                return _ask(plain, parts.netloc, path, url)
            context = tls or ssl.create_default_context()
            with context.wrap_socket(plain, server_hostname=host) as wrapped:
                return _ask(wrapped, parts.netloc, path, url)
    except (OSError, http.client.HTTPException, ValueError) as exc:
        late = time.monotonic() >= stop_s
        said = shown(str(exc), 200) or type(exc).__name__
        reason = "takes too long" if late else said
        raise UnavailableError(f"collateral: {url}: {reason}") from exc


def _connect(host: str, port: int, stop_s: float) -> socket.socket:
    """Connect to the first address that answers in time."""
    trouble: OSError = TimeoutError("no time left")
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM
    ):
        left_s = stop_s - time.monotonic()
        if left_s <= 0:
            break
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(left_s)
            sock.connect(address)
        except OSError as exc:
            sock.close()
            trouble = exc
        else:
            return sock
    raise trouble


class _Cut:
    """Shuts a socket down at a moment, whatever its other holders are doing with it."""

    def __init__(self, sock: socket.socket, stop_s: float) -> None:
        self._sock = sock
        self._timer = threading.Timer(max(0.0, stop_s - time.monotonic()), self._shut)
        self._timer.daemon = True

    def _shut(self) -> None:
        with contextlib.suppress(OSError):  # it may be closed already
            self._sock.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_exc: object) -> None:
        self._timer.cancel()
        self._timer.join()  # it must not touch a number that is somebody else's by then


def _ask(
    sock: socket.socket, netloc: str, path: str, url: str
) -> tuple[bytes, Message]:
    with contextlib.closing(http.client.HTTPConnection(netloc)) as connection:
        connection.sock = sock
        connection.request("GET", path, headers={"Connection": "close"})
        with connection.getresponse() as response:
            return _body(response, url), response.headers


def _body(response: http.client.HTTPResponse, url: str) -> bytes:
    if response.status != http.client.OK:
        redirected = 300 <= response.status < 400
        hint = _REDIRECT_HINT if redirected else _HINTS.get(response.status, "")
        text = f"collateral: {url}: HTTP status {response.status}"
        raise UnavailableError(text, hint=hint)
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise DataError(f"collateral: {url}: content encoding {encoding!r:.40}")
    body = bytearray()
    while chunk := response.read1(_CHUNK_BYTES):
        body += chunk
        if len(body) > MAX_BYTES:
            raise DataError(f"collateral: {url} has more than {MAX_BYTES} bytes")
    if response.length:
        raise ConnectionError(f"{response.length} bytes are missing at the end")
    return bytes(body)
