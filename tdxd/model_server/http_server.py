"""HTTP/1.1 for the REST API: an event loop in a thread of its own, and threads that answer.

Everything that a client sends is bounded: the head, the body, all bodies together, the number of
connections, and the time for each of them. Who does not read in time loses the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
import threading
from concurrent import futures

import grpc
import h11

from tdxd.model_server.flags import StartError
from tdxd.model_server.http_exchange import Exchange, HttpLimits, Memory, RefusedError
from tdxd.model_server.rest_api import Answer, RestApi, failure_answer

__all__ = ["HttpServer"]

_STREAM_BYTES = 64 << 10
"""How much of what a client sends is read ahead; the rest waits in the kernel."""


@dataclasses.dataclass(eq=False, slots=True)
class _State:
    """The connections, and which of them wait for a request; only the loop's thread touches it."""

    open: set[asyncio.Task[None]] = dataclasses.field(default_factory=set)
    idle: set[asyncio.Task[None]] = dataclasses.field(default_factory=set)
    draining: bool = False


class HttpServer:
    """Answers on what `listen` names, until drained; `threads` requests compute at once."""

    def __init__(
        self, api: RestApi, *, threads: int, limits: HttpLimits | None = None
    ) -> None:
        self._api = api
        self._limits = limits or HttpLimits()
        self._compute = futures.ThreadPoolExecutor(threads, thread_name_prefix="rest")
        self._quick = futures.ThreadPoolExecutor(1, thread_name_prefix="rest-quick")
        self._memory = Memory(self._limits.all_bodies_bytes)
        self._state = _State()
        self._servers: list[asyncio.Server] = []
        self._paths: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True, name="http")
        self._thread.start()

    def listen(self, *, port: int, unix_path: str) -> list[str]:
        """Start to answer on a TCP port, a unix socket, or both; return their names.

        Raises: StartError.
        """
        sockets = {}
        if port:
            sockets[f"0.0.0.0:{port}"] = ""
        if unix_path:
            sockets[f"unix:{unix_path}"] = unix_path
        self._paths += filter(None, sockets.values())
        for address, path in sockets.items():
            starting = self._start(path, port)
            try:
                server = asyncio.run_coroutine_threadsafe(starting, self._loop).result()
            except OSError as exc:
                raise StartError(
                    f"Failed to start HTTP server: cannot listen on {address}: "
                    f"{exc.strerror or exc}",
                    hint="another program may listen there, or the directory is missing",
                ) from exc
            self._servers.append(server)
        return list(sockets)

    def drain(self, limit_s: float) -> None:
        """Accept nothing more, close idle connections, wait for the requests in progress."""

        async def drain() -> None:
            self._state.draining = True
            for server in self._servers:
                server.close()
            for path in self._paths:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            for task in list(self._state.idle):
                task.cancel()
            if self._state.open:
                await asyncio.wait(set(self._state.open), timeout=limit_s)

        asyncio.run_coroutine_threadsafe(drain(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        for pool in (self._compute, self._quick):
            pool.shutdown(wait=False)

    # --- in the loop's thread -------------------------------------------------

    def _run(self) -> None:
        self._loop.run_forever()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        ended = asyncio.wait(left) if left else asyncio.sleep(0)
        self._loop.run_until_complete(ended)
        self._loop.run_until_complete(asyncio.sleep(0))  # aborted connections close now
        self._loop.close()

    async def _start(self, path: str, port: int) -> asyncio.Server:
        if path:
            return await asyncio.start_unix_server(
                self._accept, path, limit=_STREAM_BYTES
            )
        listener = socket.socket()
        try:
            # A port that was just in use may be taken again; one that is in use may not.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("0.0.0.0", port))  # noqa: S104 - as the original; see the man page
            return await asyncio.start_server(
                self._accept, sock=listener, limit=_STREAM_BYTES
            )
        except OSError:
            listener.close()
            raise

    async def _accept(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        full = len(self._state.open) >= self._limits.connections
        if full or self._state.draining:
            writer.transport.abort()
            return
        self._state.open.add(task)
        exchange = Exchange(reader, writer, self._limits, self._memory)
        try:
            while await self._one_request(exchange, task):
                pass
            await exchange.close()
        except (OSError, TimeoutError, asyncio.CancelledError, h11.ProtocolError):
            pass  # the client left, was too slow, or broke the protocol; or the server ends
        finally:
            self._state.open.discard(task)
            writer.transport.abort()

    async def _one_request(self, exchange: Exchange, task: asyncio.Task[None]) -> bool:
        """Answer one request; return whether the connection may bring another."""
        if self._state.draining:
            return False
        self._state.idle.add(task)
        try:
            await exchange.await_first_bytes()
        finally:
            self._state.idle.discard(task)
        try:
            request = await exchange.read_request()
            if request is None:
                return False
            async with exchange.body_of(request) as body:
                answer = await self._answer(request.method, request.path, body)
        except RefusedError as exc:
            await exchange.respond(exc.answer, close=True)
            return False
        return await exchange.respond(answer, close=self._state.draining)

    async def _answer(self, method: str, path: str, body: bytes) -> Answer:
        """Answer in a thread; an execution that lasts too long goes on unheard."""
        pool = self._compute if self._api.computes(method, path) else self._quick
        call = self._loop.run_in_executor(pool, self._api.answer, method, path, body)
        try:
            async with asyncio.timeout(self._limits.answer_s):
                return await call
        except TimeoutError:
            code = grpc.StatusCode.DEADLINE_EXCEEDED
            return failure_answer(code, "Timed out waiting for notification")
