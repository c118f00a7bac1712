"""The front on the real kernel: HAProxy over TLS before a gRPC server on a unix socket."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
import trio

from tdxd.core.config import Address, ServingConfig
from tdxd.errors import HostError
from tdxd.guest.front import Front, start_front
from tdxd.guest.listener import listen_tcp
from tdxd.host import proc
from tdxd.host.ports import Host
from tests.certificates import self_signed
from tests.fakes import fake_host

pytestmark = pytest.mark.root

PREDICT = "/tensorflow.serving.PredictionService/Predict"
STATUS = "/tensorflow.serving.ModelService/GetModelStatus"
RELOAD = "/tensorflow.serving.ModelService/HandleReloadConfigRequest"


class Backend(grpc.GenericRpcHandler):
    """Answers every method with the name of its slot."""

    def __init__(self, slot: str) -> None:
        self.slot = slot.encode()
        self.seen: list[str] = []

    def service(
        self, details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any]:
        self.seen.append(details.method)
        return grpc.unary_unary_rpc_method_handler(lambda _request, _context: self.slot)


@pytest.fixture
def runtime() -> Iterator[Path]:
    directory = Path("/run") / f"tdxd-front-{os.getpid()}"
    for slot in ("a", "b"):
        (directory / "serve" / slot).mkdir(parents=True)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def backends(runtime: Path) -> Iterator[dict[str, Backend]]:
    servers, handlers = [], {}
    for slot in ("a", "b"):
        server = grpc.server(futures.ThreadPoolExecutor(4))
        handlers[slot] = Backend(slot)
        server.add_generic_rpc_handlers((handlers[slot],))
        path = runtime / "serve" / slot / "model.sock"
        server.add_insecure_port(f"unix:{path}")
        server.start()
        path.chmod(0o777)
        servers.append(server)
    yield handlers
    for server in servers:
        server.stop(None).wait()


@pytest.fixture
def host() -> Iterator[Host]:
    import dataclasses

    children = proc.CellChildren()
    yield dataclasses.replace(fake_host(), children=children)
    children.close()


class Running:
    def __init__(self, front: Front, port: int, certificate: bytes) -> None:
        self.front, self.port, self.certificate = front, port, certificate

    def channel(self) -> grpc.Channel:
        credentials = grpc.ssl_channel_credentials(self.certificate)
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
        ]
        return grpc.secure_channel(
            f"localhost:{self.port}", credentials, options=options
        )

    async def call(
        self, channel: grpc.Channel, method: str, size_bytes: int = 100_000
    ) -> bytes:
        stub: Any = channel.unary_unary(method, None, None)
        return await trio.to_thread.run_sync(
            lambda: stub(b"x" * size_bytes, timeout=10, wait_for_ready=True)
        )


@pytest.fixture
async def running(runtime: Path, host: Host, backends) -> AsyncIterator[Running]:
    private, public = self_signed("localhost")
    listener = listen_tcp(Address("127.0.0.1", 0))
    port = listener.getsockname()[1]
    front = start_front(
        host=host,
        config=ServingConfig(user="nobody", drain_timeout_s=1),
        runtime_dir=str(runtime),
        listener=listener,
        certificate=private,
        key="k",
        active="a",
    )
    yield Running(front, port, public)
    await front.stop(1)
    async for _line in front.child.lines():
        pass
    listener.close()


async def test_inference_and_status_pass(running, backends) -> None:
    with running.channel() as channel:
        assert await running.call(channel, PREDICT) == b"a"
        assert await running.call(channel, STATUS) == b"a"


async def test_whatever_changes_the_server_is_refused(running, backends) -> None:
    with running.channel() as channel, pytest.raises(grpc.RpcError) as caught:
        await running.call(channel, RELOAD, size_bytes=100)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
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
    with running.channel() as channel:
        stub: Any = channel.unary_unary(PREDICT, None, None)
        with pytest.raises(grpc.RpcError) as caught:
            await trio.to_thread.run_sync(lambda: stub(b"", timeout=10))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


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


async def test_no_private_key_lies_on_a_disk(running, runtime) -> None:
    for path in runtime.rglob("*"):
        if path.is_file():
            assert b"PRIVATE KEY" not in path.read_bytes(), path


async def test_the_front_runs_unprivileged_without_a_network(running) -> None:
    with running.channel() as channel:
        await running.call(channel, PREDICT)
    status = Path(f"/proc/{running.front.child.pid}/status").read_text()
    assert "\nUid:\t65534\t65534\t65534\t65534\n" in status
    assert "\nCapEff:\t0000000000000000\n" in status
    ours = os.stat("/proc/self/ns/net").st_ino
    assert os.stat(f"/proc/{running.front.child.pid}/ns/net").st_ino != ours


def test_a_port_in_use_is_named_with_a_hint() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HostError, match=f"listen on 127.0.0.1:{port}") as caught:
            listen_tcp(Address("127.0.0.1", port))
    assert f"another program uses port {port}" in caught.value.hint
