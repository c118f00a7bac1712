"""The control socket: one request per connection, answered by one or many frames.

Who may open the socket may look; only uid 0 may change something (SO_PEERCRED, unix(7)). A
frame comes at least every five seconds, so that a caller can tell a long wait from a dead daemon.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from tdxd import __version__
from tdxd.core import wire
from tdxd.core.foreign import PASSPHRASE_MAX_BYTES
from tdxd.core.secret import Secret
from tdxd.errors import (
    NotAllowedError,
    ReexecError,
    RemoteProtocolError,
    TdxdError,
    UsageError,
)
from tdxd.guest import standstill
from tdxd.guest.daemon import Daemon
from tdxd.guest.standstill import Standstill

__all__ = ["serve"]

_KEEP_ALIVE_S = 5.0
_REQUEST_TIMEOUT_S = 10.0
_LAST_FRAME_S = 5.0
_CONVERSATION = "a control request"
_UCRED = struct.Struct("iII")
"""struct ucred of unix(7): pid, uid, gid."""

Send = Callable[[dict[str, object]], Awaitable[None]]


async def serve(listener: socket.socket, daemon: Daemon) -> None:
    """Answer connections until cancelled."""

    async def answer(stream: trio.SocketStream) -> None:
        await _connection(stream, daemon)

    await standstill.serve(
        listener, answer, standstill=daemon.standstill, what=_CONVERSATION
    )


async def _connection(stream: trio.SocketStream, daemon: Daemon) -> None:
    """Answer one connection. A boundary: whatever goes wrong in it ends it, not the daemon."""
    request_id = 0
    lock, torn = trio.Lock(), False

    async def send(message: dict[str, object]) -> None:
        nonlocal torn
        async with lock:
            torn = True
            await stream.send_all(wire.encode_frame(message))
            torn = False

    try:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                try:
                    with trio.move_on_after(_REQUEST_TIMEOUT_S) as waited:
                        message = await _read(stream)
                    if waited.cancelled_caught or message is None:
                        return
                    request_id, verb, args = wire.parse_request(message)
                    _authorise(verb, _peer_uid(stream))
                    result = await _run(verb, args, request_id, daemon, send)
                    await send(wire.reply(request_id, more=False, result=result))
                except TdxdError as exc:
                    with trio.move_on_after(0 if torn else _LAST_FRAME_S):
                        await send(wire.error_reply(request_id, exc))
    except Exception as exc:  # noqa: BLE001 — the boundary of design §7: one caller's bug
        daemon.events.emit(
            "control.crashed", level="error", error=f"{type(exc).__name__}: {exc}"
        )


async def _read(stream: trio.SocketStream) -> dict[str, object] | None:
    """Return the request; `None` if the caller hung up first.

    Raises: RemoteProtocolError.
    """
    reader = wire.FrameReader()
    while True:
        data = await stream.receive_some(65536)
        if not data:
            if reader.half_read:
                raise RemoteProtocolError(
                    "control request ended in the middle of a frame"
                )
            return None
        messages = reader.feed(data)
        if messages:
            return messages[0]


def _peer_uid(stream: trio.SocketStream) -> int:
    raw = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    uid: int = _UCRED.unpack(raw)[1]
    return uid


def _authorise(verb: str, uid: int) -> None:
    if wire.VERBS[verb] and uid != 0:
        raise NotAllowedError(
            f"{verb} is for root, the caller has uid {uid}",
            hint=f"sudo tdxctl {verb} …",
        )


async def _run(
    verb: str, args: dict[str, object], request_id: int, daemon: Daemon, send: Send
) -> object:
    """Carry out a verb, with keep-alives, and stop when the caller hangs up.

    A verb that lasts is broken off at a standstill: `tdxctl` gives it again.
    """
    result: object = None
    failure: TdxdError | None = ReexecError("tdxd is being re-executed")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_keep_alive, send, request_id, nursery.cancel_scope)
        if verb != "reexec":
            nursery.start_soon(_break_off, daemon.standstill, nursery.cancel_scope)
        try:
            result = await _VERBS[verb](daemon, args, _more(send, request_id))
        except (
            TdxdError
        ) as exc:  # carried out of the nursery, which would wrap it in a group
            failure = exc
        except trio.BrokenResourceError:
            pass  # the caller hung up
        else:
            failure = None
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return result


async def _break_off(standing: Standstill, scope: trio.CancelScope) -> None:
    await standing.until_frozen()
    scope.cancel()


async def _keep_alive(send: Send, request_id: int, scope: trio.CancelScope) -> None:
    """Show that the daemon lives; give the verb up if the caller does not."""
    while True:
        await trio.sleep(_KEEP_ALIVE_S)
        try:
            await send(wire.reply(request_id, more=True))
        except trio.BrokenResourceError:
            scope.cancel()


def _more(send: Send, request_id: int) -> Callable[..., Awaitable[None]]:
    async def more(**body: object) -> None:
        await send(wire.reply(request_id, more=True, **body))

    return more


# --- the verbs ----------------------------------------------------------------

More = Callable[..., Awaitable[None]]


def _volume_id(args: dict[str, object]) -> str:
    value = args.get("volume")
    if not isinstance(value, str):
        raise UsageError("no volume named", hint="tdxctl mount VOLUME")
    return value


def _passphrase(args: dict[str, object]) -> Secret | None:
    """Take the passphrase out of a request: none of it is kept but in the result."""
    value = args.pop("passphrase", None)
    if value is None:
        return None
    if not isinstance(value, bytes) or not 1 <= len(value) <= PASSPHRASE_MAX_BYTES:
        raise UsageError(f"a passphrase is 1 to {PASSPHRASE_MAX_BYTES} bytes")
    return Secret(value)


def _timeout_s(args: dict[str, object]) -> float:
    value = args.get("timeout_s")
    if value is None:
        return math.inf
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
        raise UsageError(f"timeout {value!r} is not a number of seconds")
    return float(value)


async def _status(daemon: Daemon, _args: dict[str, object], _more: More) -> Any:
    return daemon.status()


async def _version(daemon: Daemon, _args: dict[str, object], _more: More) -> Any:
    return _program(daemon)


def _program(daemon: Daemon) -> dict[str, object]:
    return {
        "version": __version__,
        "protocol": wire.VERSION,
        "pid": os.getpid(),
        "reexecs": daemon.reexecs,
    }


async def _health(daemon: Daemon, _args: dict[str, object], _more: More) -> Any:
    ready, reasons, code = daemon.readiness()
    return {"live": True, "ready": ready, "reasons": reasons, "exit": code}


async def _wait(daemon: Daemon, args: dict[str, object], _more: More) -> Any:
    with trio.move_on_after(_timeout_s(args)):
        await daemon.until(lambda: daemon.readiness()[0])
    ready, reasons, code = daemon.readiness()
    return {"ready": ready, "reasons": reasons, "exit": code}


async def _events(daemon: Daemon, args: dict[str, object], more: More) -> Any:
    """Send the kept events, those numbered above `after`; with `follow`, each new one, too."""
    last = args.get("after")
    last = last if isinstance(last, int) and last <= daemon.events.count else 0
    while True:
        count = daemon.events.heard.count
        for item in daemon.events.after(last):
            last = int(str(item["seq"]))
            if args.get("all") or item["level"] != "debug":
                await more(event=item)
        if not args.get("follow"):
            return {"last": last}
        await daemon.events.heard.after(count)


async def _mount(daemon: Daemon, args: dict[str, object], _more: More) -> Any:
    volume_id = _volume_id(args)
    daemon.volumes.named(volume_id)  # named wrongly: nobody takes the passphrase
    await daemon.mount(volume_id, _passphrase(args))
    return daemon.status()


async def _unmount(daemon: Daemon, args: dict[str, object], _more: More) -> Any:
    await daemon.unmount(_volume_id(args))
    return daemon.status()


async def _reload(daemon: Daemon, _args: dict[str, object], _more: More) -> Any:
    await daemon.reload()
    return daemon.status()


async def _retry(daemon: Daemon, args: dict[str, object], _more: More) -> Any:
    await daemon.retry(_volume_id(args) if args.get("volume") else None)
    return daemon.status()


async def _doctor(daemon: Daemon, _args: dict[str, object], _more: More) -> Any:
    """Examine the machine as the daemon sees it, from inside its sandbox."""
    from tdxd.guest import doctor

    loaded = daemon.loaded
    findings = await trio.to_thread.run_sync(
        doctor.examine, loaded, abandon_on_cancel=True
    )
    return doctor.report(findings)


async def _reexec(daemon: Daemon, _args: dict[str, object], more: More) -> Any:
    """Give way to the new program; the exec itself ends the conversation."""

    async def accepted() -> None:
        await more(accepted=_program(daemon))

    with daemon.standstill.apart(_CONVERSATION):
        await daemon.reexec(accepted)


_VERBS: dict[str, Callable[[Daemon, dict[str, object], More], Awaitable[Any]]] = {
    "status": _status,
    "version": _version,
    "doctor": _doctor,
    "health": _health,
    "wait": _wait,
    "events": _events,
    "mount": _mount,
    "unmount": _unmount,
    "reload": _reload,
    "retry": _retry,
    "reexec": _reexec,
}
