"""Standstill: what is under way ends, and nothing new begins."""

from __future__ import annotations

import socket

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tdxd.errors import ReexecError
from tdxd.guest.standstill import Standstill, serve


async def test_it_is_reached_once_what_is_under_way_has_ended() -> None:
    standstill = Standstill()
    order: list[str] = []

    async def work(name: str, end: trio.Event) -> None:
        with standstill.running(name):
            await end.wait()
        order.append(name)

    ends = [trio.Event(), trio.Event()]
    async with trio.open_nursery() as nursery:
        for number, end in enumerate(ends):
            nursery.start_soon(work, f"work {number}", end)
        await wait_all_tasks_blocked()
        standstill.freeze()
        for end in ends:
            end.set()
        with trio.fail_after(5):
            await standstill.reached(5)
        order.append("reached")
    assert sorted(order[:2]) == ["work 0", "work 1"]
    assert order[2] == "reached"


async def test_with_nothing_under_way_no_other_task_runs_in_between() -> None:
    standstill = Standstill()
    standstill.freeze()
    ran = False

    async def other() -> None:
        nonlocal ran
        ran = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await standstill.reached(5)
        assert not ran


def test_what_does_not_end_is_named() -> None:
    async def main() -> None:
        standstill = Standstill()
        standstill.enter("a mapping")
        standstill.enter("serving")
        standstill.freeze()
        started_s = trio.current_time()
        with pytest.raises(
            ReexecError, match="after 20 s: a mapping, serving"
        ) as caught:
            await standstill.reached(20)
        assert trio.current_time() == started_s + 20
        assert caught.value.exit_code == 75

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def test_work_waits_in_the_passage_until_it_is_released() -> None:
    standstill = Standstill()
    await standstill.passage()
    standstill.freeze()
    passed = trio.Event()

    async def worker() -> None:
        await standstill.passage()
        passed.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker)
        await wait_all_tasks_blocked()
        assert not passed.is_set()
        standstill.release()
    assert passed.is_set()


async def test_a_release_ends_the_waiting_for_it() -> None:
    standstill = Standstill()
    standstill.enter("serving")
    standstill.freeze()
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(ReexecError, match="stopping"):
                await standstill.reached(60)

        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        standstill.release()


async def test_the_caller_itself_can_be_left_out() -> None:
    standstill = Standstill()
    with standstill.running("a request"):
        standstill.freeze()
        with standstill.apart("a request"):
            await standstill.reached(5)
        standstill.release()
    standstill.freeze()
    await standstill.reached(0)


async def test_connections_wait_in_the_queue_while_it_lasts() -> None:
    """One that was accepted is answered first; the others are answered after the release."""
    standstill = Standstill()
    answer = trio.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    port = listener.getsockname()[1]

    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            await answer.wait()
            await stream.send_all(b"hello")

    async def client() -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", port)

    async with trio.open_nursery() as nursery:

        async def listen() -> None:
            await serve(listener, handle, standstill=standstill, what="a request")

        nursery.start_soon(listen)
        first, second = await client(), await client()
        await trio.sleep(0.05)
        standstill.freeze()
        with pytest.raises(ReexecError, match="a request"):
            await standstill.reached(0.05)
        answer.set()
        await standstill.reached(5)
        assert await first.receive_some() == await second.receive_some() == b"hello"

        early, late = await client(), await client()  # the first may still get through
        await trio.sleep(0.05)
        await standstill.reached(5)
        with trio.move_on_after(0.2) as waited:
            await late.receive_some()
        assert waited.cancelled_caught
        standstill.release()
        assert await early.receive_some() == await late.receive_some() == b"hello"
        for one in (first, second, early, late):
            await one.aclose()
        nursery.cancel_scope.cancel()
