"""Looks whether the machine can hold two model servers, before there are two."""

from __future__ import annotations

from collections.abc import Iterable

import trio

from tdxd.core.plan import check_room as check_figures
from tdxd.errors import NotReadyError
from tdxd.guest.server import ModelServer
from tdxd.host.ports import Host

__all__ = ["check_room"]

_LOOK_S = 5.0


async def check_room(host: Host, servers: Iterable[ModelServer]) -> None:
    """Check that there is memory for one more, as large as the largest of these.

    The kernel may keep the figures of a process back that waits for a disk.

    Raises: NoRoomError, NotReadyError if they are not to be had, HostError.
    """
    pids = [one.child.pid for one in servers]

    def look() -> tuple[int, int]:
        running = [host.tree_memory_bytes(pid) for pid in pids]
        return max(running, default=0), host.available_memory_bytes()

    with trio.move_on_after(_LOOK_S):
        running_bytes, available_bytes = await trio.to_thread.run_sync(
            look, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
        )
        check_figures(running_bytes=running_bytes, available_bytes=available_bytes)
        return
    text = "how much memory the model server takes is not to be had"
    raise NotReadyError(text, hint="does the disk of its volumes answer?")
