"""Clients that behave badly, while another one calls without a pause: none of its calls fails."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import shutil
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
import trio

from tdxd.core.config import ServingConfig
from tdxd.host import proc
from tdxd.host.ports import Host
from tests.contract.fronts import PREDICT, Backend, Running, front_of
from tests.fakes import fake_host

pytestmark = pytest.mark.root

IDLE = 1000
LONG_BYTES = 64 * 2**20
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = bytes.fromhex("000000040000000000")


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[Host, Path]]:
    """A directory with a model server's socket, and children that can start."""
    directory = Path("/run") / f"tdxd-load-{os.getpid()}"
    for slot in ("a", "b"):
        (directory / "serve" / slot).mkdir(parents=True)
    server = grpc.server(
        futures.ThreadPoolExecutor(4),
        options=[("grpc.max_receive_message_length", -1)],
    )
    server.add_generic_rpc_handlers((Backend("a"),))
    path = directory / "serve" / "a" / "model.sock"
    server.add_insecure_port(f"unix:{path}")
    server.start()
    path.chmod(0o777)
    children = proc.CellChildren()
    yield dataclasses.replace(fake_host(), children=children), directory
    children.close()
    server.stop(None).wait()
    shutil.rmtree(directory)


@pytest.fixture
async def running(place: tuple[Host, Path]) -> AsyncIterator[Running]:
    config = ServingConfig(user="nobody", drain_timeout_s=1, client_timeout_s=2)
    async with front_of(*place, config) as made:
        yield made


async def while_calling(running: Running, attack: Callable[[], None]) -> int:
    """Run an attack in a thread; return how many calls passed meanwhile. One that fails raises."""
    passed = 0
    done = trio.Event()

    async def call() -> None:
        nonlocal passed
        with running.channel() as channel:
            while not done.is_set() or not passed:
                assert await running.call(channel, PREDICT) == b"a"
                passed += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        await trio.to_thread.run_sync(attack)
        done.set()
    return passed


def connected(running: Running) -> socket.socket:
    context = running.tls()
    context.set_alpn_protocols(["h2"])
    raw = socket.create_connection(("127.0.0.1", running.port), timeout=30)
    return context.wrap_socket(raw, server_hostname="localhost")


async def test_a_thousand_idle_connections(running: Running) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, IDLE * 2 + 500)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))

    def idle() -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(IDLE):
                stack.enter_context(
                    socket.create_connection(("127.0.0.1", running.port), timeout=30)
                )

    try:
        assert await while_calling(running, idle) > 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_malformed_http2_harms_nobody_else(running: Running) -> None:
    frames = (
        b"GET / HTTP/1.1\r\n\r\n",
        PREFACE + os.urandom(4096),
        PREFACE + SETTINGS + bytes.fromhex("ffffff010500000001") + bytes(100),
        PREFACE + SETTINGS + bytes.fromhex("000004080000000000ffffffff") * 3,
        PREFACE + SETTINGS + bytes.fromhex("000008060000000000") + bytes(8) + bytes(64),
        PREFACE + SETTINGS + bytes.fromhex("000005010500000001") + b"\xff" * 5,
    )

    def send() -> None:
        for sent in frames:
            with connected(running) as tls, contextlib.suppress(OSError):
                tls.sendall(sent)
                tls.settimeout(0.3)
                while tls.recv(65536):
                    pass

    assert await while_calling(running, send) > 0
    assert Path(f"/proc/{running.front.child.pid}").exists()


async def test_clients_that_never_read_harm_nobody_else(running: Running) -> None:
    """Each asks for settings to be acknowledged without end, and takes nothing."""

    def never_read() -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                tls = stack.enter_context(connected(running))
                tls.settimeout(0.2)
                with contextlib.suppress(OSError):
                    tls.sendall(PREFACE + SETTINGS * 20_000)

    assert await while_calling(running, never_read) > 0


async def test_a_request_of_64_mib_passes_beside_others(running: Running) -> None:
    with running.channel() as channel:
        answers: list[bytes] = []

        async def long() -> None:
            answers.append(
                await running.call(channel, PREDICT, LONG_BYTES, timeout_s=60)
            )

        async with trio.open_nursery() as nursery:
            nursery.start_soon(long)
            with running.channel() as other:
                for _ in range(5):
                    assert await running.call(other, PREDICT) == b"a"
    assert answers == [b"a"]
