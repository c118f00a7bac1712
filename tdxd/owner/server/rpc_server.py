"""The key server's gRPC side: raw bytes in and out, and nobody who keeps the others waiting.

One event loop per process. A call is counted when its headers are there: over a limit it is refused
before its body is read, and a body that does not come in time ends the call, so that slow clients
hold no thread and no more than their own share of calls. Both methods are unary on the wire; here
they are taken as streams of one message, since only then does grpcio call before the body is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from tdxd.core import keyrelease as protocol
from tdxd.core.config import Address
from tdxd.errors import ConfigError, HostError, RemoteProtocolError, TdxdError
from tdxd.owner.server.at_hand import WouldWaitError, without_waiting
from tdxd.owner.server.init import ServerTls
from tdxd.owner.server.limits import Gate, Kind, LimitsConfig, peer_name

if TYPE_CHECKING:
    import grpc.aio

__all__ = ["OnEnd", "RpcServer", "Service"]

_log: structlog.stdlib.BoundLogger = structlog.get_logger()

_THREADS = 4
"""For requests that wait for collateral, and for long ones."""
_QUICK_BYTES = 256 * 1024
"""Up to this size a request is answered in the loop: a log of the usual 64 KiB and more."""
_SWEEP_S = 1.0
_TELL_S = 10.0
_HANDSHAKE_MS = 10_000
_IDLE_MS = 60_000
_AGE_MS = 600_000
_AGE_GRACE_MS = 60_000

_Handler = Callable[[bytes, str], bytes]
OnEnd = Callable[[Kind, str, float], None]
"""Hears of each call that has ended: its gRPC status, and how long it took in seconds."""


class Service(Protocol):
    """The two calls, on raw bytes, with gRPC's name of the peer; `Keyd` is the one that runs.

    Raises: RemoteProtocolError for a malformed request, TdxdError where it cannot answer.
    """

    def challenge(self, request: bytes, peer: str, /) -> bytes:
        """Answer a `ChallengeRequest`."""
        ...

    def release(self, request: bytes, peer: str, /) -> bytes:
        """Answer a `ReleaseRequest`."""
        ...


class RpcServer:
    """One listening server of one event loop: `start` and `stop` it there."""

    def __init__(
        self,
        service: Service,
        tls: ServerTls,
        limits: LimitsConfig,
        *,
        share_port: bool,
        on_end: OnEnd = lambda _kind, _code, _took_s: None,
    ) -> None:
        self._service = service
        self._tls = tls
        self._limits = limits
        self._share_port = share_port
        self._on_end = on_end
        self._gate = Gate(limits, time.monotonic)
        self._receiving: dict[Any, float] = {}  # by context, oldest first
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="keyd")
        self._server: grpc.aio.Server | None = None
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self, address: Address) -> int:
        """Start answering; return the port.

        Raises: HostError if the port is taken, ConfigError if key and certificate do not fit.
        """
        import grpc

        self._server = server = grpc.aio.server(options=self._options())
        # No (de)serialisers: requests are hashed exactly as they were received.
        rpcs: dict[str, Any] = {
            "Challenge": grpc.stream_unary_rpc_method_handler(self._challenge),
            "Release": grpc.stream_unary_rpc_method_handler(self._release),
        }
        name = protocol.RELEASE_PATH.split("/")[1]
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(name, rpcs),)
        )
        pair = (self._tls.key_pem, self._tls.certificate_pem)
        try:
            credentials = grpc.ssl_server_credentials([pair])
            port = server.add_secure_port(str(address), credentials)
        except RuntimeError as exc:
            hint = "is the port in use, and has the certificate this key?"
            raise HostError("listen on", str(address), 0, hint=hint) from exc
        except ValueError as exc:
            raise ConfigError(f"TLS certificate and key: {exc}") from exc
        await server.start()
        self._sweeper = asyncio.create_task(self._sweep())
        return port

    async def stop(self, grace_s: float) -> None:
        """Stop listening; calls in work may end within the grace period."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._server is not None:
            await self._server.stop(grace_s)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _options(self) -> list[tuple[str, int]]:
        return [
            ("grpc.so_reuseport", int(self._share_port)),
            ("grpc.max_receive_message_length", protocol.REQUEST_MAX_BYTES),
            ("grpc.max_concurrent_streams", self._limits.peer_calls),
            ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
            ("grpc.max_connection_idle_ms", _IDLE_MS),
            ("grpc.max_connection_age_ms", _AGE_MS),
            ("grpc.max_connection_age_grace_ms", _AGE_GRACE_MS),
        ]

    async def _challenge(self, _messages: object, context: Any) -> bytes:
        # For `doctor`, which compares the clocks; nothing rests on it.
        context.set_trailing_metadata(((protocol.CLOCK_KEY, str(int(time.time()))),))
        return await self._timed(Kind.CHALLENGE, self._service.challenge, context)

    async def _release(self, _messages: object, context: Any) -> bytes:
        return await self._timed(Kind.RELEASE, self._service.release, context)

    async def _timed(self, kind: Kind, handler: _Handler, context: Any) -> bytes:
        began_s, code = time.monotonic(), "CANCELLED"
        try:
            answer = await self._call(kind, handler, context)
            code = "OK"
            return answer
        finally:
            code = _aborted_with(context) or code
            self._on_end(kind, code, time.monotonic() - began_s)

    async def _call(self, kind: Kind, handler: _Handler, context: Any) -> bytes:
        import grpc

        code = grpc.StatusCode
        connection = context.peer()
        peer = peer_name(connection)
        refusal = self._gate.enter(peer, kind)
        if refusal:
            await context.abort(code.RESOURCE_EXHAUSTED, refusal)
        try:
            request = await self._receive(context)
            left_s = context.time_remaining()
            if left_s is not None and left_s <= 0:  # nobody waits for the answer
                await context.abort(code.DEADLINE_EXCEEDED, "too late to begin")
            return await self._answer(handler, request, connection)
        except RemoteProtocolError as exc:
            _log.warning("request.malformed", peer=connection, error=exc.message)
            await context.abort(code.INVALID_ARGUMENT, exc.message)
        except TdxdError as exc:  # no audit record, no answer
            _log.error(
                "request.failed", peer=connection, error=exc.message, hint=exc.hint
            )
            await context.abort(code.UNAVAILABLE, "the key server's store fails")
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as exc:  # noqa: BLE001  # a bug: its text is nobody else's business
            _log.error("request.crashed", peer=connection, error=type(exc).__name__)
            await context.abort(code.INTERNAL, "internal error")
        finally:
            self._gate.leave(peer)
        raise AssertionError("abort returns never")

    async def _receive(self, context: Any) -> bytes:
        """Return the request; `_sweep` ends the call of one that does not come."""
        import grpc

        self._receiving[context] = time.monotonic() + self._limits.receive_s
        try:
            request = await context.read()
        finally:
            self._receiving.pop(context, None)
        if request is grpc.aio.EOF:
            raise RemoteProtocolError("call without a request")
        assert isinstance(request, bytes)
        return request

    async def _answer(self, handler: _Handler, request: bytes, peer: str) -> bytes:
        if len(request) <= _QUICK_BYTES:
            with contextlib.suppress(WouldWaitError), without_waiting():
                return handler(request, peer)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, handler, request, peer)

    async def _sweep(self) -> None:
        told_s, told = time.monotonic(), 0
        while True:
            await asyncio.sleep(_SWEEP_S)
            now_s = time.monotonic()
            for context, until_s in list(self._receiving.items()):
                if until_s > now_s:
                    break
                await self._overdue(context)
            refused = self._gate.refused
            if refused != told and now_s - told_s >= _TELL_S:
                _log.warning("calls.refused", calls=refused - told)
                told_s, told = now_s, refused

    async def _overdue(self, context: Any) -> None:
        import grpc

        self._receiving.pop(context, None)
        text = f"the request did not arrive within {self._limits.receive_s:g} s"
        with contextlib.suppress(grpc.aio.BaseError):  # AbortError, or it ended already
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, text)


def _aborted_with(context: Any) -> str:
    """Return the status that a call was aborted with, "" if it was not."""
    import grpc

    number = context.code()
    if not number:
        return ""
    return next(
        (one.name for one in grpc.StatusCode if number in (one, one.value[0])), ""
    )
