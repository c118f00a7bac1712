"""The health endpoint: `/livez`, `/readyz` and `/metrics` over HTTP/1.1.

Prometheus text format, version 0.0.4. Answers hold states and counts only, nothing secret:
whoever reaches the address may read them.
"""

from __future__ import annotations

import socket

import trio

from tdxd.core.exposition import CONTENT_TYPE
from tdxd.guest import standstill
from tdxd.guest.daemon import Daemon
from tdxd.guest.http_reply import Reply, converse
from tdxd.guest.metrics import metrics_text
from tdxd.guest.standstill import SILENT_S

__all__ = ["serve"]

_TIMEOUT_S = 10.0


async def serve(listener: socket.socket, daemon: Daemon) -> None:
    """Answer HTTP connections until cancelled."""

    async def reply(target: str) -> Reply:
        return await _reply(daemon, target.partition("?")[0])

    async def answer(stream: trio.SocketStream) -> None:
        with trio.move_on_after(_TIMEOUT_S):
            async with stream:
                await converse(stream, reply)

    await standstill.serve(
        listener, answer, standstill=daemon.standstill, what="a health request"
    )


async def _reply(daemon: Daemon, path: str) -> Reply:
    match path:
        case "/livez":
            return _alive(daemon)
        case "/readyz":
            ready, reasons, _code = daemon.readiness()
            if ready:
                return Reply(body=b"ok\n")
            return Reply(status=503, body=("\n".join(reasons) + "\n").encode())
        case "/metrics":
            body = (await metrics_text(daemon)).encode()
            return Reply(kind=CONTENT_TYPE, body=body)
    return Reply(status=404, body=b"known: /livez /readyz /metrics\n")


def _alive(daemon: Daemon) -> Reply:
    """Say what the watchdog of the service manager is told: whether a reconciler hangs."""
    silent_s = trio.current_time() - min(daemon.beats())
    if silent_s < SILENT_S:
        return Reply(body=b"ok\n")
    return Reply(status=503, body=f"a reconciler hangs for {silent_s:.0f} s\n".encode())
