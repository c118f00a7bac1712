"""The health endpoint: `/livez`, `/readyz` and `/metrics` over HTTP/1.1.

Prometheus text format, version 0.0.4. Answers hold states and counts only, nothing secret:
whoever reaches the address may read them.
"""

from __future__ import annotations

import json
import socket

import h11
import trio

from tdxd.guest import standstill
from tdxd.guest.daemon import Daemon

__all__ = ["serve"]

_TIMEOUT_S = 10.0
_TEXT = "text/plain; charset=utf-8"
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


async def serve(listener: socket.socket, daemon: Daemon) -> None:
    """Answer HTTP connections until cancelled."""

    async def answer(stream: trio.SocketStream) -> None:
        with trio.move_on_after(_TIMEOUT_S):
            async with stream:
                await _connection(stream, daemon)

    await standstill.serve(
        listener, answer, standstill=daemon.standstill, what="a health request"
    )


async def _connection(stream: trio.SocketStream, daemon: Daemon) -> None:
    http = h11.Connection(h11.SERVER)
    method = ""
    try:
        request = await _request(stream, http)
        if request is None:
            return
        method, target = request.method.decode(), request.target.decode("latin-1")
        status, kind, body = _answer(daemon, method, target.partition("?")[0])
    except h11.RemoteProtocolError as exc:
        status, kind, body = exc.error_status_hint, _TEXT, "bad request\n"
    if http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
        return
    data = body.encode()
    headers = [("Content-Type", kind), ("Content-Length", str(len(data)))]
    response = h11.Response(
        status_code=status, headers=[*headers, ("Connection", "close")]
    )
    try:
        await stream.send_all(http.send(response))
        await stream.send_all(
            b"" if method == "HEAD" else http.send(h11.Data(data=data))
        )
    except trio.BrokenResourceError:
        return


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
            http.receive_data(await stream.receive_some(16384))
        except trio.BrokenResourceError:
            return None


def _answer(daemon: Daemon, method: str, path: str) -> tuple[int, str, str]:
    if method not in ("GET", "HEAD"):
        return 405, _TEXT, "only GET\n"
    match path:
        case "/livez":
            return 200, _TEXT, "ok\n"
        case "/readyz":
            ready, reasons, _code = daemon.readiness()
            return (
                (200, _TEXT, "ok\n")
                if ready
                else (503, _TEXT, "\n".join(reasons) + "\n")
            )
        case "/metrics":
            return 200, _PROMETHEUS, _metrics(daemon)
    return 404, _TEXT, "known: /livez /readyz /metrics\n"


def _metrics(daemon: Daemon) -> str:
    shown = daemon.status()
    serving = shown["serving"]
    lines = [
        "# HELP tdxd_ready Whether everything that is required serves.",
        "# TYPE tdxd_ready gauge",
        f"tdxd_ready {int(shown['ready'])}",
        "# HELP tdxd_volume_state The state of each volume: 1 for the one it is in.",
        "# TYPE tdxd_volume_state gauge",
    ]
    for one in shown["volumes"]:
        labels = f"volume={json.dumps(one['id'])},state={json.dumps(one['state'])}"
        lines.append(f"tdxd_volume_state{{{labels}}} 1")
    lines += [
        "# HELP tdxd_volume_lease_left_seconds How long a volume may be open without a renewal.",
        "# TYPE tdxd_volume_lease_left_seconds gauge",
    ]
    for one in shown["volumes"]:
        if one["lease_left_s"] is not None:
            labels = f"volume={json.dumps(one['id'])}"
            lines.append(
                f"tdxd_volume_lease_left_seconds{{{labels}}} {one['lease_left_s']}"
            )
    lines += [
        "# HELP tdxd_serving_state The state of serving: 1 for the one it is in.",
        "# TYPE tdxd_serving_state gauge",
        f"tdxd_serving_state{{state={json.dumps(serving['state'])}}} 1",
        "# HELP tdxd_child_restarts_total Children that ended by themselves.",
        "# TYPE tdxd_child_restarts_total counter",
        f"tdxd_child_restarts_total {serving['restarts']}",
    ]
    return "\n".join(lines) + "\n"
