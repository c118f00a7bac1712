"""One HTTP/1.1 request and its answer on a connection: what the daemon's small endpoints share.

Only GET and HEAD; a body of the request is not read, the connection closes after the answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable

import h11
import trio

__all__ = ["TEXT", "Answer", "Reply", "converse"]

TEXT = "text/plain; charset=utf-8"
_READ_BYTES = 16384
_READ_S = _SEND_S = 10.0
"""Less than an exec waits for what is under way: nobody who is slow can keep it off."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A status, a content type, a body, and further headers."""

    status: int = 200
    kind: str = TEXT
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


Answer = Callable[[str], Awaitable[Reply]]
"""Answers a GET of a target, which is the path with its query."""


async def converse(stream: trio.SocketStream, answer: Answer) -> None:
    """Read one request and answer it; the caller closes the stream."""
    http = h11.Connection(h11.SERVER)
    method, request = "", None
    try:
        with trio.move_on_after(_READ_S):
            request = await _request(stream, http)
        if request is None:
            return
        method, target = request.method.decode(), request.target.decode("latin-1")
        if method not in ("GET", "HEAD"):
            reply = Reply(status=405, body=b"only GET\n")
        else:
            reply = await answer(target)
    except h11.RemoteProtocolError as exc:
        reply = Reply(status=exc.error_status_hint, body=b"bad request\n")
    if http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
        with trio.move_on_after(_SEND_S):
            await _send(stream, http, reply, head_only=method == "HEAD")


async def _request(
    stream: trio.SocketStream, http: h11.Connection
) -> h11.Request | None:
    """Return the request's head; `None` if the client hung up."""
    while True:
        event = http.next_event()
        if isinstance(event, h11.Request):
            return event
        if event is not h11.NEED_DATA:
            return None
        try:
            http.receive_data(await stream.receive_some(_READ_BYTES))
        except trio.BrokenResourceError:
            return None


async def _send(
    stream: trio.SocketStream, http: h11.Connection, reply: Reply, *, head_only: bool
) -> None:
    headers = [
        ("Content-Type", reply.kind),
        ("Content-Length", str(len(reply.body))),
        *reply.headers,
        ("Connection", "close"),
    ]
    response = h11.Response(status_code=reply.status, headers=headers)
    try:
        await stream.send_all(http.send(response))
        if not head_only:
            await stream.send_all(http.send(h11.Data(data=reply.body)))
    except trio.BrokenResourceError:
        return
