"""gRPC calls from trio: raw bytes in, raw bytes out, cancellable.

grpcio's own blocking calls cannot be cancelled from a worker thread, so every call is a future that
wakes the task and is cancelled with it. grpcio is imported inside the functions: it costs 50 ms of
a program's start.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import trio

from tdxd.core.config import Address
from tdxd.core.keyrelease import ANSWER_MAX_BYTES, CHALLENGE_PATH, RELEASE_PATH
from tdxd.core.showing import shown
from tdxd.errors import DeniedError, KeyReleaseError, UnreachableError

if TYPE_CHECKING:
    import grpc

__all__ = [
    "GrpcKeyServer",
    "RpcFailedError",
    "tls_channel",
    "unary_call",
    "unix_channel",
]

_TEXT_MAX_CHARS = 300
_UNBOUNDED_S = 3600.0
"""Deadline told to the server where the caller's own trio deadline rules."""


class RpcFailedError(UnreachableError):
    """A call ended with a gRPC status other than OK: `status` is its name, as `NOT_FOUND`."""

    def __init__(self, message: str, *, status: str, details: str) -> None:
        super().__init__(message)
        self.status = status
        self.details = details


def _options(max_bytes: int) -> list[tuple[str, int]]:
    return [
        # No proxy that the environment names may stand between us and a pinned server.
        ("grpc.enable_http_proxy", 0),
        # A channel of its own connection: backoff and failures of another are not ours.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.max_receive_message_length", max_bytes),
    ]


def unix_channel(path: str, *, max_bytes: int = 4 * 2**20) -> grpc.Channel:
    """Open a channel to a Unix socket; connects at the first call."""
    import grpc

    options = [
        *_options(max_bytes),
        ("grpc.default_authority", "localhost"),
        # A server that takes a minute to listen is found at once then, not up to a minute later.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 500),
    ]
    return grpc.insecure_channel(f"unix:{path}", options=options)


def tls_channel(
    address: Address, ca_pem: bytes, *, max_bytes: int = ANSWER_MAX_BYTES
) -> grpc.Channel:
    """Open a channel to a server that must prove itself to one CA; connects at the first call."""
    import grpc

    credentials = grpc.ssl_channel_credentials(root_certificates=ca_pem)
    return grpc.secure_channel(str(address), credentials, options=_options(max_bytes))


async def unary_call(
    channel: grpc.Channel, path: str, request: bytes, *, timeout_s: float
) -> bytes:
    """Make one unary call; cancelling the task cancels the call on both ends.

    Raises: RpcFailedError.
    """
    import grpc

    call: Any = channel.unary_unary(
        path, request_serializer=None, response_deserializer=None
    )
    done = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def wake(_future: object) -> None:
        with contextlib.suppress(trio.RunFinishedError):  # nobody waits any more
            token.run_sync_soon(done.set)

    future: Any = call.future(request, timeout=timeout_s)
    try:
        future.add_done_callback(wake)
        await done.wait()
        answer = future.result()
    except grpc.RpcError as exc:
        status = exc.code().name
        details = shown(exc.details() or "", _TEXT_MAX_CHARS)
        text = f"call {path} failed: {status}: {details}"
        raise RpcFailedError(text, status=status, details=details) from exc
    except grpc.FutureCancelledError as exc:
        text = f"call {path} was cancelled"
        raise RpcFailedError(text, status="CANCELLED", details="") from exc
    finally:
        if not future.done():
            future.cancel()
    assert isinstance(answer, bytes)
    return answer


class GrpcKeyServer:
    """One key server over TLS (the `KeyServer` of `ports`)."""

    def __init__(self, address: Address, ca_pem: bytes) -> None:
        self._address = address
        self._channel = tls_channel(address, ca_pem)

    async def challenge(self) -> bytes:
        """Return an encoded `ChallengeResponse`.

        Raises: UnreachableError, DeniedError, KeyReleaseError.
        """
        return await self._call(CHALLENGE_PATH, b"")

    async def release(self, request: bytes) -> bytes:
        """Send an encoded `ReleaseRequest`, return the encoded `ReleaseResponse`.

        Raises: UnreachableError, DeniedError, KeyReleaseError.
        """
        return await self._call(RELEASE_PATH, request)

    async def aclose(self) -> None:
        """Close the channel."""
        self._channel.close()

    async def _call(self, path: str, request: bytes) -> bytes:
        try:
            return await unary_call(
                self._channel, path, request, timeout_s=_UNBOUNDED_S
            )
        except RpcFailedError as exc:
            raise _key_release_error(self._address, exc) from exc


def _key_release_error(address: Address, exc: RpcFailedError) -> KeyReleaseError:
    text = f"key server {address}: {exc.status}: {exc.details}"
    if exc.status in {"PERMISSION_DENIED", "UNAUTHENTICATED"}:
        return DeniedError(text)
    if exc.status in {"INVALID_ARGUMENT", "UNIMPLEMENTED", "FAILED_PRECONDITION"}:
        return KeyReleaseError(
            text, hint="do guest and key server have the same version?"
        )
    hint = ""
    if "certificate" in exc.details.lower() or "handshake" in exc.details.lower():
        hint = "its certificate is not of the CA that key_release.ca names, or has another name"
    return UnreachableError(text, hint=hint)
