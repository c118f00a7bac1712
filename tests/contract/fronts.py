"""A front on the real kernel, with gRPC servers behind it and callers before it."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import ssl
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import trio

from tdxd.core.config import Address, ServingConfig
from tdxd.guest.certificates import Certificates
from tdxd.guest.front import Front
from tdxd.guest.front_start import Sockets, start_front
from tdxd.guest.listener import listen_tcp
from tdxd.host.ports import Host
from tests.certificates import self_signed

__all__ = ["PREDICT", "RELOAD", "STATUS", "Backend", "Running", "front_of"]

PREDICT = "/tensorflow.serving.PredictionService/Predict"
STATUS = "/tensorflow.serving.ModelService/GetModelStatus"
RELOAD = "/tensorflow.serving.ModelService/HandleReloadConfigRequest"
LONGEST = 200 * 2**20


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


@dataclasses.dataclass
class Running:
    """A front that runs, the ports it listens on, and all that it said."""

    front: Front
    port: int
    rest_port: int
    certificate: bytes
    lines: list[str] = dataclasses.field(default_factory=list)

    def channel(self, client: bytes | None = None) -> grpc.Channel:
        """Return a channel of its own; `client` is a key with its certificate."""
        credentials = grpc.ssl_channel_credentials(self.certificate, client, client)
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
            ("grpc.max_send_message_length", LONGEST),
        ]
        return grpc.secure_channel(
            f"localhost:{self.port}", credentials, options=options
        )

    async def call(
        self,
        channel: grpc.Channel,
        method: str,
        size_bytes: int = 100_000,
        *,
        timeout_s: float = 10,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> bytes:
        stub: Any = channel.unary_unary(method, None, None)
        return await trio.to_thread.run_sync(
            lambda: stub(
                b"x" * size_bytes,
                timeout=timeout_s,
                wait_for_ready=True,
                metadata=metadata,
            )
        )

    async def refusal(self, method: str, size_bytes: int = 100) -> grpc.StatusCode:
        """Return the status of a call that must fail."""
        with self.channel() as channel:
            try:
                await self.call(channel, method, size_bytes)
            except grpc.RpcError as exc:
                code: grpc.StatusCode = exc.code()
                return code
        raise AssertionError(f"{method} passed")

    def tls(self, client: bytes | None = None) -> ssl.SSLContext:
        """Return a context that trusts this front alone."""
        context = ssl.create_default_context(cadata=self.certificate.decode())
        if client is not None:
            with tempfile.NamedTemporaryFile() as file:
                file.write(client)
                file.flush()
                context.load_cert_chain(file.name)
        return context

    def _rest(
        self,
        method: str,
        path: str,
        body: Any,
        client: bytes | None,
        more: dict[str, str],
    ) -> tuple[int, str]:
        connection = http.client.HTTPSConnection(
            "localhost", self.rest_port, timeout=10, context=self.tls(client)
        )
        with contextlib.closing(connection):
            # The answer can come, and the front hang up, before all was sent.
            with contextlib.suppress(ssl.SSLEOFError, ConnectionError):
                connection.request(method, path, body, more)
            response = connection.getresponse()
            return response.status, response.read().decode()

    async def rest(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        client: bytes | None = None,
        **more: str,
    ) -> tuple[int, str]:
        """Send a request of HTTP/1.1; return status and body."""
        call = self._rest
        return await trio.to_thread.run_sync(call, method, path, body, client, more)


@contextlib.asynccontextmanager
async def front_of(
    host: Host,
    directory: Path,
    config: ServingConfig,
    *,
    client_ca: bytes | None = None,
) -> AsyncIterator[Running]:
    """Start a front with these settings; its addresses are chosen here."""
    private, public = self_signed("localhost")
    grpc_socket = listen_tcp(Address("127.0.0.1", 0))
    rest_socket = listen_tcp(Address("127.0.0.1", 0))
    with grpc_socket, rest_socket:
        rest = rest_socket if config.rest_listen is not None else None
        front = await start_front(
            host=host,
            config=config,
            runtime_dir=str(directory),
            sockets=Sockets(grpc=grpc_socket, rest=rest),
            certificates=Certificates(server=private, client_ca=client_ca),
            key="k",
            active="a",
        )
        running = Running(
            front, grpc_socket.getsockname()[1], rest_socket.getsockname()[1], public
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_read, running)
            try:
                yield running
            finally:
                with trio.CancelScope(shield=True):
                    await front.stop(1)


async def _read(running: Running) -> None:
    async for line in running.front.child.lines():
        running.lines.append(line)
