"""Serving with the real front, before gRPC servers that stand for model servers; no TensorFlow.

The reconciler is the real one: certificates are changed as the daemon does it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.client
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Self

import grpc
import trio

from tdxd.core.config import (
    Config,
    ControlConfig,
    KeyReleaseConfig,
    ServingConfig,
    VolumeConfig,
)
from tdxd.guest.changes import Changes
from tdxd.guest.events import Events
from tdxd.guest.handover import ServedVolume
from tdxd.guest.server import ModelServer, models_key
from tdxd.guest.serving import ServingReconciler
from tdxd.guest.standstill import Standstill
from tdxd.host.ports import Host
from tests.contract.fronts import PREDICT
from tests.daemon.test_cut_off import FakeCell, FakeChild
from tests.daemon.test_daemon import KEY
from tests.fakes import FakeVolumes

__all__ = ["Certified", "Visit", "certified", "free_port", "leaf_of"]

_END_S = 15.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as made:
        port: int = made.getsockname()[1]
        return port


def leaf_of(public: bytes) -> str:
    """Return the SHA-256 of a certificate in PEM, in hex."""
    der = ssl.PEM_cert_to_DER_cert(public.decode())
    return hashlib.sha256(der).hexdigest()


class Visit:
    """A connection of HTTP/1.1 to the front, whose own health answers on it."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock
        self._http = http.client.HTTPConnection("localhost", timeout=10)
        self._http.sock = sock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._sock.close()
        self._http.close()

    @property
    def certificate(self) -> str:
        """The SHA-256 of what it was shown."""
        shown = self._sock.getpeercert(binary_form=True)
        assert shown is not None
        return hashlib.sha256(shown).hexdigest()

    @property
    def session(self) -> ssl.SSLSession | None:
        """What another connection may go on with, once this one was answered."""
        return self._sock.session

    def answered(self) -> bool:
        """Ask once more: TLS 1.3 refuses a client only after its handshake."""
        try:
            self._http.request("GET", "/healthz")
            return self._http.getresponse().read() == b"ok"
        except (ssl.SSLError, ConnectionError):
            return False


class Certified:
    """A reconciler of serving whose secrets and volumes the test sets."""

    def __init__(
        self,
        host: Host,
        directory: Path,
        serving: ServingConfig,
        nursery: trio.Nursery,
        secrets: dict[str, bytes],
    ) -> None:
        self.directory, self.serving = directory, serving
        self.contents = {name: (1, pem) for name, pem in secrets.items()}
        self.changes, self.events = Changes(), Events()
        self.served: tuple[ServedVolume, ...] = (self.volume(1),)
        self.revoked: frozenset[tuple[str, int | None]] = frozenset()
        self.port = int(serving.listen.rpartition(":")[2])
        self.rest_port = int((serving.rest_listen or ":0").rpartition(":")[2])
        self.one = ServingReconciler(
            host=host,
            config=Config(
                key_release=KeyReleaseConfig(
                    servers=("localhost:1",), ca="/ca", signing_key=KEY
                ),
                volume=(VolumeConfig(id="m", image="/none"),),
                serving=serving,
                control=ControlConfig(runtime_dir=str(directory)),
            ),
            standstill=Standstill(),
            changes=self.changes,
            events=self.events,
            volumes=FakeVolumes(lambda: self.served, lambda: self.revoked),
            secrets=self,
            nursery=nursery,
        )
        self.add("a", self.served)

    # --- secrets ---

    def pem(self, secret_id: str) -> bytes | None:
        return self.contents[secret_id][1] if secret_id in self.contents else None

    def tag(self, secret_id: str) -> str | None:
        if secret_id not in self.contents:
            return None
        return f"{secret_id}@{self.contents[secret_id][0]}"

    def put(self, secret_id: str, pem: bytes) -> None:
        """Make a new generation of a secret."""
        self.contents[secret_id] = (self.contents[secret_id][0] + 1, pem)
        self.changes.ring()

    def take_away(self, secret_id: str) -> None:
        del self.contents[secret_id]
        self.changes.ring()

    # --- volumes ---

    def volume(self, generation: int) -> ServedVolume:
        path = str(self.directory / "volumes" / f"m@{generation}")
        return ServedVolume(volume_id="m", generation=generation, mount_point=path)

    def seal(self, generation: int, pem: bytes) -> None:
        path = Path(self.volume(generation).mount_point, "tls")
        path.mkdir(parents=True)
        (path / "server.pem").write_bytes(pem)

    def add(self, slot: str, volumes: tuple[ServedVolume, ...]) -> None:
        server = ModelServer(
            slot=slot,
            key=models_key(volumes, self.serving),
            volumes=volumes,
            models=(),
            child=FakeChild(f"server {slot}", []),
            cell=FakeCell(),
            socket_path="/none",
        )
        server.ready = True
        self.one.servers[slot] = server

    # --- what clients see ---

    def context(self, client: Path | None = None) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if client is not None:
            context.load_cert_chain(client)
        return context

    def visit(
        self, context: ssl.SSLContext, session: ssl.SSLSession | None = None
    ) -> Visit:
        """Connect for REST."""
        raw = socket.create_connection(("127.0.0.1", self.rest_port), 10)
        return Visit(context.wrap_socket(raw, session=session))

    def lets_in(
        self, context: ssl.SSLContext, session: ssl.SSLSession | None = None
    ) -> bool:
        """Say whether a new connection is answered."""
        with self.visit(context, session) as one:
            return one.answered()

    def _shown(self) -> str:
        with self.visit(self.context()) as one:
            return one.certificate

    async def shown(self) -> str:
        """Return the SHA-256 of the certificate that a new connection is shown."""
        return await trio.to_thread.run_sync(self._shown)

    def channel(self, *roots: bytes) -> grpc.Channel:
        credentials = grpc.ssl_channel_credentials(b"".join(roots))
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
        return grpc.secure_channel(
            f"localhost:{self.port}", credentials, options=options
        )

    async def call(self, channel: grpc.Channel, timeout_s: float = 10) -> bytes:
        """Call once; the channel must be connected already, or connect within the time."""
        stub: Any = channel.unary_unary(PREDICT, None, None)

        def send() -> bytes:
            answer: bytes = stub(b"x" * 1000, timeout=timeout_s, wait_for_ready=True)
            return answer

        return await trio.to_thread.run_sync(send)

    # --- waiting ---

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(_END_S):
            while not condition():
                await trio.sleep(0.02)

    async def until_renewed(self, times: int = 1) -> None:
        def renewed() -> bool:
            counts = self.events.by_kind.items()
            kind = "front.certificates_renewed"
            return sum(count for key, count in counts if key[0] == kind) >= times

        await self.until(renewed)

    async def until_up(self) -> None:
        await self.until(lambda: self.one.serving and self.one.settled)

    async def kill_front(self) -> None:
        """End the front as a crash does, and wait for the next one."""
        front = self.one.front
        assert front is not None
        os.kill(front.child.pid, signal.SIGKILL)
        await self.until(lambda: self.one.front not in (None, front))
        await self.until_up()


@contextlib.asynccontextmanager
async def certified(
    host: Host,
    directory: Path,
    *,
    secrets: dict[str, bytes] | None = None,
    sealed: bytes = b"",
    **settings: Any,
) -> AsyncIterator[Certified]:
    """Run serving; its certificate is the secret "web", or `sealed` in the volume m."""
    serving = ServingConfig(
        listen=f"127.0.0.1:{free_port()}",
        rest_listen=f"127.0.0.1:{free_port()}",
        user="nobody",
        drain_timeout_s=2,
    )
    serving = dataclasses.replace(serving, **settings)
    async with trio.open_nursery() as nursery:
        made = Certified(host, directory, serving, nursery, secrets or {})
        if sealed:
            made.seal(1, sealed)
        nursery.start_soon(made.one.run)
        try:
            await made.until_up()
            yield made
        finally:
            with trio.CancelScope(shield=True):
                nursery.cancel_scope.cancel()
                await made.one.close()
