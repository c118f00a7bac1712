"""One HTTP/1.1 connection of the REST server: requests within limits, answers within time."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

import h11

from tdxd.model_server.rest_api import Answer
from tdxd.model_server.rest_response import error_json

__all__ = ["Exchange", "HttpLimits", "Memory", "RefusedError", "Request"]

_CHUNK_BYTES = 64 << 10
_LINGER_S = 2.0
"""How long a refused client may go on sending: a reset would take the answer from it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """What one client, and all of them together, may use."""

    head_bytes: int = 16 << 10
    body_bytes: int = 64 << 20
    all_bodies_bytes: int = 256 << 20
    connections: int = 1000
    idle_s: float = 60.0
    head_s: float = 10.0
    body_s: float = 60.0
    answer_s: float = 30.0
    write_s: float = 60.0


class RefusedError(Exception):
    """A request that is answered unread; its connection ends."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.answer = Answer(status=status, body=error_json(text))


class Memory:
    """Counts the bytes of all bodies that are held."""

    def __init__(self, limit_bytes: int) -> None:
        self._left_bytes = limit_bytes

    def take(self, size_bytes: int) -> None:
        """Count bytes as held.

        Raises: RefusedError if all bodies together would be too large.
        """
        if size_bytes > self._left_bytes:
            raise RefusedError(503, "too many large requests at the same time")
        self._left_bytes -= size_bytes

    def give(self, size_bytes: int) -> None:
        """Count them as gone."""
        self._left_bytes += size_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request's head. `size_bytes`: of the body, as far as the client says."""

    method: str
    path: str
    size_bytes: int
    encoding: str


class Exchange:
    """Requests and answers in turn, over one connection."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        limits: HttpLimits,
        memory: Memory,
    ) -> None:
        self._reader, self._writer = reader, writer
        self._limits, self._memory = limits, memory
        self._http = h11.Connection(
            h11.SERVER, max_incomplete_event_size=limits.head_bytes
        )
        self._method = ""

    async def await_first_bytes(self) -> None:
        """Wait for the next request to begin.

        Raises: TimeoutError.
        """
        if self._http.trailing_data[0]:
            return
        async with asyncio.timeout(self._limits.idle_s):
            self._http.receive_data(await self._reader.read(_CHUNK_BYTES))

    async def read_request(self) -> Request | None:
        """Return a request's head; None if the client has left.

        Raises: RefusedError, TimeoutError.
        """
        try:
            async with asyncio.timeout(self._limits.head_s):
                event = await self._event()
        except h11.RemoteProtocolError as exc:
            raise RefusedError(exc.error_status_hint, f"bad request: {exc}") from exc
        if not isinstance(event, h11.Request):
            return None
        self._method = event.method.decode("latin-1")
        fields = {
            name.decode(): value.decode("latin-1") for name, value in event.headers
        }
        return Request(
            method=self._method,
            path=event.target.decode("latin-1").partition("?")[0],
            size_bytes=int(fields.get("content-length", "0")),
            encoding=fields.get("content-encoding", "identity").lower(),
        )

    @contextlib.asynccontextmanager
    async def body_of(self, request: Request) -> AsyncIterator[bytes]:
        """Read a request's body; its bytes count as held inside.

        Raises: RefusedError, TimeoutError.
        """
        if request.encoding != "identity":
            text = f"Content-Encoding {request.encoding} is not supported"
            raise RefusedError(415, text)
        held_bytes, parts = 0, []
        try:
            async with asyncio.timeout(self._limits.body_s):
                self._check_size(request.size_bytes)
                if self._http.they_are_waiting_for_100_continue:
                    go_on = h11.InformationalResponse(status_code=100, headers=[])
                    self._writer.write(self._http.send(go_on) or b"")
                while isinstance(event := await self._event(), h11.Data):
                    size_bytes = len(event.data)
                    self._check_size(held_bytes + size_bytes)
                    self._memory.take(size_bytes)
                    held_bytes += size_bytes
                    parts.append(bytes(event.data))
            yield b"".join(parts)
        except h11.RemoteProtocolError as exc:
            raise RefusedError(exc.error_status_hint, f"bad request: {exc}") from exc
        finally:
            self._memory.give(held_bytes)

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self._limits.body_bytes:
            text = f"the body is larger than {self._limits.body_bytes} bytes"
            raise RefusedError(413, text)

    async def _event(self) -> object:
        while True:
            event = self._http.next_event()
            if event is not h11.NEED_DATA:
                return event
            self._http.receive_data(await self._reader.read(_CHUNK_BYTES))

    async def respond(self, answer: Answer, *, close: bool) -> bool:
        """Send an answer; return whether the connection may bring another request.

        Raises: TimeoutError.
        """
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return False
        headers = [
            ("Content-Type", answer.content_type),
            ("Content-Length", str(len(answer.body))),
        ]
        if close:
            headers.append(("Connection", "close"))
        head = h11.Response(status_code=answer.status, headers=headers)
        self._writer.write(self._http.send(head) or b"")
        if self._method != "HEAD":
            self._writer.write(self._http.send(h11.Data(data=answer.body)) or b"")
        self._writer.write(self._http.send(h11.EndOfMessage()) or b"")
        async with asyncio.timeout(self._limits.write_s):
            await self._writer.drain()
        if self._states() != (h11.DONE, h11.DONE):
            return False
        self._http.start_next_cycle()
        return True

    def _states(self) -> tuple[object, object]:
        return self._http.our_state, self._http.their_state

    async def close(self) -> None:
        """Let the client read the rest of the answer, then close.

        Raises: TimeoutError.
        """
        if self._http.their_state not in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED):
            await self._linger()
        self._writer.close()
        async with asyncio.timeout(self._limits.write_s):
            await self._writer.wait_closed()

    async def _linger(self) -> None:
        """Read on what nobody wants: to close now would reset the connection."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                if self._writer.can_write_eof():
                    self._writer.write_eof()
                while await self._reader.read(_CHUNK_BYTES):
                    pass
