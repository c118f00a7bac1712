"""The evidence endpoint: `GET /.well-known/tdxd/evidence?nonce=HEX` on a unix socket of the front.

The front lets exactly this path through to it, on the listener of inference. Whoever may call the
model may ask; the answer holds nothing secret: see `core.endpoint_proof`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import trio

from tdxd.core.endpoint_proof import nonce_of_target
from tdxd.errors import CrowdedError, HostError, TdxdError
from tdxd.guest import standstill
from tdxd.guest.http_reply import Reply, converse
from tdxd.guest.prover import Prover
from tdxd.guest.standstill import Standstill

__all__ = ["listen_for_front", "serve"]

_TIMEOUT_S = 45.0
"""For one connection: a quote may take the host 30 s."""
_BACKLOG = 64
_KIND = "application/msgpack"


def listen_for_front(path: str) -> socket.socket:
    """Return a listening socket that any user can reach who reaches its directory, like the front.

    Raises: HostError.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.exists(path):
            os.unlink(path)
        made.bind(path)
        os.chmod(path, 0o666)  # noqa: S103 — it gives no more than the front gives to anybody
        made.listen(_BACKLOG)
    except OSError as exc:
        made.close()
        raise HostError.of("listen on", path, exc) from exc
    made.setblocking(False)
    return made


async def serve(
    listener: socket.socket,
    prover: Prover,
    standing: Standstill,
    *,
    wanted: Callable[[], bool],
) -> None:
    """Answer until cancelled; with 404 while `wanted` says that clients may not ask."""

    async def reply(target: str) -> Reply:
        if not wanted():
            return Reply(status=404, body=b"this guest gives no evidence to clients\n")
        return await _reply(prover, target)

    async def answer(stream: trio.SocketStream) -> None:
        with trio.move_on_after(_TIMEOUT_S):
            async with stream:
                await converse(stream, reply)

    await standstill.serve(
        listener, answer, standstill=standing, what="a request for evidence"
    )


async def _reply(prover: Prover, target: str) -> Reply:
    nonce = nonce_of_target(target)
    if nonce is None:
        return Reply(status=400, body=b"nonce must be 64 lower-case hex digits\n")
    try:
        evidence = await prover.evidence(nonce)
    except CrowdedError as exc:
        return _later(1, exc.message)
    except TdxdError:  # its words are for the operator: an event tells them
        return _later(10, "this guest has no evidence to give now")
    headers = (("Cache-Control", "no-store"),)
    return Reply(kind=_KIND, body=evidence.encode(), headers=headers)


def _later(seconds: int, text: str) -> Reply:
    headers = (("Retry-After", str(seconds)),)
    return Reply(status=503, body=f"{text}\n".encode(), headers=headers)
