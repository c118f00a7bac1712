"""A front that ended the socket it was given: it is replaced, and the socket made anew."""

from __future__ import annotations

import socket

import trio
import trio.testing

from tdxd.guest.handover import HandedListener
from tests.daemon.test_cut_off import Serving


async def test_a_front_on_a_dead_socket_is_ended_without_a_drain() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mine:
        address = "{}:{}".format(*mine.getsockname())
        handed = HandedListener(address=address, fd=mine.dup().detach())
        async with trio.open_nursery() as nursery:
            serving = Serving(nursery)
            front = serving.one.front
            assert front is not None
            front.key = serving.one._goal().front_key  # type: ignore[union-attr]
            serving.one.door.adopt(handed, None)
            nursery.start_soon(serving.one.run)
            await trio.testing.wait_all_tasks_blocked()
            assert serving.journal == []
            mine.shutdown(socket.SHUT_RDWR)
            serving.changes.ring()
            with trio.fail_after(5):
                while serving.one.front is not None:
                    await trio.sleep(0.01)
            assert serving.journal == ["stop front"]
            assert front.child.stop_s == 3.0  # type: ignore[attr-defined]
            serving.one.door.close()
            nursery.cancel_scope.cancel()
