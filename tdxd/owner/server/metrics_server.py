"""The key server's `/metrics` over HTTP/1.1, in a thread of the parent process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

from tdxd.core.config import Address, parse_address
from tdxd.core.exposition import CONTENT_TYPE
from tdxd.errors import HostError
from tdxd.owner.server.config import MetricsConfig

__all__ = ["metrics_server"]

_TIMEOUT_S = 5.0
_HEAD_MAX_BYTES = 8192
_CALLS_MAX = 16
_TEXT = "text/plain; charset=utf-8"


@contextlib.contextmanager
def metrics_server(
    config: MetricsConfig, render: Callable[[], str]
) -> Iterator[Address]:
    """Answer scrapes with what `render` returns; yields the address.

    Raises: HostError if the address cannot be had.
    """
    address = parse_address(config.listen)
    try:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        listening = socket.create_server((address.host, address.port), family=family)
    except OSError as exc:
        hint = "is the port of [metrics] listen in use?"
        raise HostError.of("listen on", str(address), exc, hint=hint) from exc
    port = listening.getsockname()[1]
    loop = asyncio.new_event_loop()
    task = loop.create_task(_serve(listening, render))

    def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=run, name="metrics", daemon=True)
    thread.start()
    try:
        yield Address(address.host, port)
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.close()


async def _serve(listening: socket.socket, render: Callable[[], str]) -> None:
    free = asyncio.Semaphore(_CALLS_MAX)

    async def answer(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError, TimeoutError):
            if free.locked():
                return
            async with free, asyncio.timeout(_TIMEOUT_S):
                writer.write(await _answer(reader, render))
                await writer.drain()

    server = await asyncio.start_server(
        answer, sock=listening, limit=_HEAD_MAX_BYTES, backlog=_CALLS_MAX
    )
    async with server:
        await server.serve_forever()


async def _answer(reader: asyncio.StreamReader, render: Callable[[], str]) -> bytes:
    """Return the whole answer to one request, after which the connection ends."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return _response("400 Bad Request", _TEXT, "no request\n")
    method, _, rest = head.partition(b" ")
    path = rest.split(b" ")[0].partition(b"?")[0]
    if method not in (b"GET", b"HEAD"):
        return _response("405 Method Not Allowed", _TEXT, "only GET\n")
    if path != b"/metrics":
        return _response("404 Not Found", _TEXT, "known: /metrics\n")
    whole = _response("200 OK", CONTENT_TYPE, render())
    if method == b"HEAD":
        return whole.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    return whole


def _response(status: str, kind: str, body: str) -> bytes:
    data = body.encode()
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + data
