"""The front on the real kernel: HAProxy over TLS before a gRPC server on a unix socket."""

from __future__ import annotations

import os
import re
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import trio

from tdxd.core.config import Address, ServingConfig
from tdxd.errors import HostError, ServerExitedError
from tdxd.guest.certificates import Certificates
from tdxd.guest.front_start import Sockets, start_front
from tdxd.guest.listener import listen_tcp
from tests.contract.fronts import PREDICT, RELOAD, STATUS, Running, front_of

pytestmark = pytest.mark.root


@pytest.fixture
async def running(front_dir, host, backends) -> AsyncIterator[Running]:
    config = ServingConfig(user="nobody", drain_timeout_s=1)
    async with front_of(host, front_dir, config) as made:
        yield made


async def test_inference_and_status_pass(running, backends) -> None:
    with running.channel() as channel:
        assert await running.call(channel, PREDICT) == b"a"
        assert await running.call(channel, STATUS) == b"a"


async def test_whatever_changes_the_server_is_refused(running, backends) -> None:
    """In words that arrive, however long the request is."""
    for size_bytes in (0, 100, 5_000_000):
        code = await running.refusal(RELOAD, size_bytes)
        assert code is grpc.StatusCode.UNIMPLEMENTED
    assert backends["a"].seen == []


async def test_streams_move_to_the_other_slot_without_a_failed_call(running) -> None:
    answers: list[bytes] = []

    async def send(stop: trio.Event) -> None:
        with running.channel() as channel:
            while not stop.is_set():
                answers.append(await running.call(channel, PREDICT))

    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(send, stop)
        for slot in ("b", "a", "b"):
            await trio.sleep(0.3)
            await running.front.switch(slot)
        await trio.sleep(0.3)
        stop.set()
    assert {b"a", b"b"} == set(answers)
    assert answers[-1] == b"b"
    with trio.fail_after(5):
        while await running.front.streams("a"):
            await trio.sleep(0.05)


async def test_without_a_model_server_the_status_is_unavailable(running) -> None:
    await running.front.forget("a")
    for size_bytes in (0, 5_000_000):
        code = await running.refusal(PREDICT, size_bytes)
        assert code is grpc.StatusCode.UNAVAILABLE


async def test_tls_1_2_is_refused(running) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("127.0.0.1", running.port)) as raw,
        pytest.raises(ssl.SSLError),
    ):
        context.wrap_socket(raw)


async def test_no_private_key_lies_on_a_disk(running, front_dir) -> None:
    for path in front_dir.rglob("*"):
        if path.is_file():
            assert b"PRIVATE KEY" not in path.read_bytes(), path


async def test_the_front_runs_unprivileged_without_a_network(running) -> None:
    with running.channel() as channel:
        await running.call(channel, PREDICT)
    status = Path(f"/proc/{running.front.child.pid}/status").read_text()
    uids = re.search(r"^Uid:\t(.*)$", status, re.MULTILINE)
    assert uids is not None
    (uid,) = set(uids[1].split())  # its own user where the packages made that one
    assert uid != "0"
    assert "\nCapEff:\t0000000000000000\n" in status
    ours = os.stat("/proc/self/ns/net").st_ino
    assert os.stat(f"/proc/{running.front.child.pid}/ns/net").st_ino != ours


def test_a_port_in_use_is_named_with_a_hint() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HostError, match=f"listen on 127.0.0.1:{port}") as caught:
            listen_tcp(Address("127.0.0.1", port))
    assert f"another program uses port {port}" in caught.value.hint


async def test_a_bad_certificate_is_refused_in_haproxys_words(host, front_dir) -> None:
    """Before it runs, and nothing stays: no descriptor, no child."""
    before = len(os.listdir("/proc/self/fd"))
    with (
        listen_tcp(Address("127.0.0.1", 0)) as listening,
        pytest.raises(ServerExitedError, match="unable to load") as caught,
    ):
        await start_front(
            host=host,
            config=ServingConfig(user="nobody"),
            runtime_dir=str(front_dir),
            sockets=Sockets(grpc=listening),
            certificates=Certificates(server=b"no certificate"),
            key="k",
            active="a",
        )
    assert "refuses the front's configuration" in caught.value.message
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the shared network
