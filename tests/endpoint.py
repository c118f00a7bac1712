"""A guest that proves its endpoint: a simulated platform whose RTMR3 is extended, behind the front.

All of it in one process and without a daemon: the real prover, its unix socket, and HAProxy with
the real configuration before a gRPC server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from pathlib import Path
from signal import SIGTERM
from typing import Any, Self

import grpc
import trio

from tdxd.core.bundle import Manifest
from tdxd.core.config import Address, PlatformConfig, ServingConfig
from tdxd.guest.certificates import Certificates
from tdxd.guest.events import Events
from tdxd.guest.evidence_endpoint import listen_for_front, serve
from tdxd.guest.front import Front
from tdxd.guest.front_start import Sockets, evidence_path, start_front
from tdxd.guest.listener import listen_tcp
from tdxd.guest.prover import Prover
from tdxd.guest.runtime_record import RuntimeRecord
from tdxd.guest.standstill import Standstill
from tdxd.host.ports import Cell, Child, ChildSpec, Tsm
from tdxd.sim.platform import SimPlatform
from tests.certificates import self_signed
from tests.fake_tsm import FakeTsm
from tests.fakes import FakeChildren, fake_host

__all__ = ["Middleman", "PlatformRtmr", "ProvingGuest", "proving_guest", "record_of"]

_END_S = 20.0


class PlatformRtmr:
    """RTMR3 of a simulated platform, as a guest extends it."""

    def __init__(self, platform: SimPlatform) -> None:
        self._platform = platform

    def value(self) -> bytes:
        return self._platform.rtmrs[3]

    def check(self) -> None:
        """It can always be extended."""

    def extend(self, digest: bytes) -> None:
        self._platform.extend_rtmr(3, digest)


def record_of(platform: SimPlatform, directory: Path) -> RuntimeRecord:
    config = PlatformConfig(runtime_log=str(directory / "runtime-log"))
    return RuntimeRecord(
        PlatformRtmr(platform), config, events=Events(), boot_id="boot"
    )


class _Echo(grpc.GenericRpcHandler):
    """A model server that answers every method with what it was sent."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []

    def service(
        self, _details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any]:
        def answer(request: bytes, _context: Any) -> bytes:
            self.heard.append(request)
            return request

        return grpc.unary_unary_rpc_method_handler(answer)


class ProvingGuest:
    """A guest in a thread of its own; `served` is the PEM, with its key, of the front of now."""

    attest = True
    """Whether the front lets clients ask, from its next start on."""

    def __init__(self, platform: SimPlatform, runtime: Path, tsm: Tsm | None) -> None:
        self.platform = platform
        self.tsm = tsm or FakeTsm(platform)
        self.served, _public = self_signed("localhost")
        self.model = _Echo()
        self.standstill = Standstill()
        self.wanted = True
        self._runtime = runtime
        self._record = record_of(platform, runtime)
        self._listener = listen_tcp(Address("127.0.0.1", 0))
        self.address = f"localhost:{self._listener.getsockname()[1]}"
        self._front: Front | None = None
        self._ready, self._failed = threading.Event(), False
        self._stop: trio.Event | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self.prover = Prover(
            tsm=self.tsm,
            record=self._record,
            served_key=self._served_key,
            standstill=self.standstill,
            events=Events(),
            counts={"given": 0, "busy": 0, "failed": 0},
        )

    def _served_key(self) -> bytes | None:
        return self._front.served_key if self._front is not None else None

    def serve_volume(self, manifest: Manifest) -> None:
        """Extend RTMR3 as before serving it."""
        self._do(self._record.add, manifest)

    def rotate(self, pem: bytes) -> None:
        """Serve another certificate from now on."""
        self._do(self._end_front)
        self.served = pem
        self._do(self._start_front)

    def renew(self, pem: bytes) -> None:
        """Give the running front another certificate."""
        assert self._front is not None
        self._do(self._front.renew, Certificates(server=pem))
        self.served = pem

    def held(self) -> None:
        """Wait for what a key release waits for before its quote is made."""

        async def hold() -> None:
            async with self._record.held():
                pass

        self._do(hold)

    def _do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return trio.from_thread.run(function, *arguments, trio_token=self._token)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=trio.run, args=(self._main,))
        thread.start()
        try:
            assert self._ready.wait(_END_S), "the guest does not start"
            assert not self._failed, "the guest did not start"
            yield
        finally:
            if self._stop is not None and self._token is not None:
                with contextlib.suppress(trio.RunFinishedError):
                    self._token.run_sync_soon(self._stop.set)
            thread.join(_END_S)
            self._listener.close()

    async def _main(self) -> None:
        self._token, self._stop = trio.lowlevel.current_trio_token(), trio.Event()
        try:
            async with trio.open_nursery() as nursery:
                endpoint = listen_for_front(evidence_path(str(self._runtime)))
                nursery.start_soon(self._serve, endpoint)
                await self._start_front()
                self._ready.set()
                await self._stop.wait()
                await self._end_front()
                nursery.cancel_scope.cancel()
        finally:
            self._failed = not self._ready.is_set()
            self._ready.set()

    async def _serve(self, endpoint: socket.socket) -> None:
        await serve(endpoint, self.prover, self.standstill, wanted=lambda: self.wanted)

    async def _start_front(self) -> None:
        self._front = await start_front(
            host=dataclasses.replace(fake_host(), children=_PlainChildren()),
            config=ServingConfig(user="root", drain_timeout_s=1, attest=self.attest),
            runtime_dir=str(self._runtime),
            sockets=Sockets(grpc=self._listener),
            certificates=Certificates(server=self.served),
            key="k",
            active="a",
        )

    async def _end_front(self) -> None:
        front, self._front = self._front, None
        if front is not None:
            await front.child.stop(0)


class _PlainCell:
    """No namespace: what that is for is tried elsewhere."""

    def close(self) -> None:
        """There is nothing to let go of."""


class _PlainChild:
    """A child of this process, whichever thread started it."""

    def __init__(self, spec: ChildSpec) -> None:
        self._process = subprocess.Popen(
            spec.argv,
            pass_fds=spec.pass_fds,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.pid = self._process.pid

    async def wait(self) -> int:
        return await trio.to_thread.run_sync(self._process.wait)

    async def stop(self, timeout_s: float, *, signal: int = SIGTERM) -> int:
        self._process.send_signal(signal)
        status = await self.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        return status

    async def lines(self) -> AsyncIterator[str]:
        assert self._process.stdout is not None
        for line in await trio.to_thread.run_sync(self._process.stdout.readlines):
            yield line


class _PlainChildren(FakeChildren):
    """Starts real programs, but as root and in no cell: from a thread that could not be."""

    def make_cell(self, **_options: Any) -> Cell:
        return _PlainCell()

    def spawn(self, spec: ChildSpec) -> Child:
        return _PlainChild(spec)


@contextlib.contextmanager
def proving_guest(
    platform: SimPlatform | None = None,
    *,
    tsm: Tsm | None = None,
    model: grpc.GenericRpcHandler | None = None,
) -> Iterator[ProvingGuest]:
    """Run a guest behind the real front; needs root. `model` answers instead of an echo."""
    runtime = Path(tempfile.mkdtemp(prefix=f"tdxd-endpoint-{os.getpid()}-", dir="/run"))
    runtime.chmod(0o755)
    backends = []
    try:
        guest = ProvingGuest(platform or SimPlatform.create(), runtime, tsm)
        for slot in ("a", "b"):
            (runtime / "serve" / slot).mkdir(parents=True)
        backend = grpc.server(futures.ThreadPoolExecutor(4))
        backend.add_generic_rpc_handlers((model or guest.model,))
        path = runtime / "serve" / "a" / "model.sock"
        backend.add_insecure_port(f"unix:{path}")
        backend.start()
        backends.append(backend)
        path.chmod(0o777)
        with guest.running():
            yield guest
    finally:
        for one in backends:
            one.stop(None).wait()
        shutil.rmtree(runtime)


class Middleman:
    """Ends the client's TLS with a certificate of its own, and passes on to somebody else.

    `answer` may give each connection its answer instead, from what the client sent; `heard` is
    everything that clients sent, in the clear.
    """

    def __init__(
        self,
        pem: bytes,
        target: str,
        answer: Callable[[bytes], bytes | None] = lambda _sent: None,
    ) -> None:
        self._target, self._answer = target, answer
        self.heard: list[bytes] = []
        self.answers: list[bytes] = []
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.set_alpn_protocols(["h2", "http/1.1"])
        with tempfile.NamedTemporaryFile() as file:
            file.write(pem)
            file.flush()
            self._context.load_cert_chain(file.name)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"localhost:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(_END_S)
        self._listener.close()

    def _run(self) -> None:
        while True:
            try:
                plain, _peer = self._listener.accept()
            except OSError:
                return
            with plain, contextlib.suppress(OSError, ssl.SSLError):
                plain.settimeout(_END_S)
                with self._context.wrap_socket(plain, server_side=True) as client:
                    self._one(client)

    def _one(self, client: ssl.SSLSocket) -> None:
        sent = client.recv(65536)
        self.heard.append(sent)
        answer = self._answer(sent)
        if answer is None:
            answer = self._passed_on(sent)
        self.answers.append(answer)
        client.sendall(answer)

    def _passed_on(self, sent: bytes) -> bytes:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        host, _, port = self._target.rpartition(":")
        with (
            socket.create_connection((host, int(port)), _END_S) as plain,
            context.wrap_socket(plain, server_hostname=host) as server,
        ):
            server.sendall(sent)
            received = b""
            while data := server.recv(65536):
                received += data
            return received
