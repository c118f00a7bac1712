"""What the front takes from clients, over gRPC and REST, and how it says no."""

from __future__ import annotations

import shutil
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import trio

from tdxd.core.config import ServingConfig
from tdxd.host.haproxy_config import rest_port
from tdxd.host.ports import ChildSpec, Host
from tests.certificates import self_signed
from tests.contract.fronts import PREDICT, RELOAD, Running, front_of

pytestmark = pytest.mark.root

MODEL = "/v1/models/digits"
LIMIT = 300_000
REST_SERVER = f"""
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        text = (self.command + " " + self.path).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    do_POST = do_DELETE = do_GET
    def log_message(self, *_):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", {rest_port("a")}), Handler)
print("listening", flush=True)
server.serve_forever()
"""


def settings(**more: object) -> ServingConfig:
    return ServingConfig(user="nobody", drain_timeout_s=1, **more)  # type: ignore[arg-type]


@pytest.fixture
async def rest_server(host: Host, front_dir: Path) -> AsyncIterator[None]:
    """An HTTP server on the loopback interface that front and model servers share."""
    cell = host.children.make_cell(hide=str(front_dir), binds=[])
    argv = ("/usr/bin/python3", "-I", "-c", REST_SERVER)
    child = host.children.spawn(
        ChildSpec(name="rest", argv=argv, user="nobody", cell=cell)
    )
    said: list[str] = []

    async def read() -> None:
        async for line in child.lines():
            said.append(line)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        with trio.fail_after(20):
            while "listening" not in said:
                await trio.sleep(0.01)
        yield
        await child.stop(0)
    cell.close()


@pytest.fixture
async def running(front_dir, host, backends, rest_server) -> AsyncIterator[Running]:
    config = settings(
        rest_listen="127.0.0.1:0", max_request_bytes=LIMIT, monitoring=True
    )
    async with front_of(host, front_dir, config) as made:
        yield made


ALLOWED = (
    ("POST", f"{MODEL}:predict"),
    ("POST", f"{MODEL}/versions/12:classify"),
    ("POST", f"{MODEL}/labels/stable:regress"),
    ("GET", MODEL),
    ("GET", f"{MODEL}/versions/1"),
    ("GET", f"{MODEL}/labels/stable/metadata"),
    ("GET", f"{MODEL}/metadata"),
    ("GET", "/monitoring/prometheus/metrics"),
)
REFUSED = (
    ("GET", "/", 404),
    ("GET", "/v1/models", 404),
    ("GET", "/v1/models/../metadata", 404),
    ("GET", "/v1/models/%2e%2e/metadata", 404),
    ("GET", f"/x{MODEL}", 404),
    ("GET", f"{MODEL}/versions/x", 404),
    ("POST", f"{MODEL}:reload", 404),
    ("POST", f"{MODEL}/versions/1/x:predict", 404),
    ("GET", "/monitoring/prometheus/metrics/x", 404),
    ("GET", f"{MODEL}:predict", 405),
    ("DELETE", MODEL, 405),
    ("POST", MODEL, 405),
)


async def test_rest_inference_and_status_pass_and_nothing_else(running) -> None:
    for method, path in ALLOWED:
        body = b"{}" if method == "POST" else None
        assert await running.rest(method, path, body) == (200, f"{method} {path}")
    for method, path, status in REFUSED:
        body = b"{}" if method == "POST" else None
        got, text = await running.rest(method, path, body)
        assert (got, text[:12]) == (status, '{ "error": "'), (method, path)


async def test_a_long_request_is_refused(running) -> None:
    assert (await running.rest("POST", f"{MODEL}:predict", b"x" * LIMIT))[0] == 200
    told = {"content-length": str(LIMIT + 1)}  # the front does not wait for the rest
    status, text = await running.rest("POST", f"{MODEL}:predict", **told)
    assert (status, text) == (
        413,
        f'{{ "error": "request longer than {LIMIT} bytes" }}',
    )
    chunks = iter([b"x"])
    status, _text = await running.rest("POST", f"{MODEL}:predict", chunks)
    assert status == 411


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
async def test_a_long_call_is_refused_if_it_tells_its_length(
    running, backends, tmp_path
) -> None:
    """Others are the model server's to refuse: the front does not store what it passes on."""
    (tmp_path / "ca.pem").write_bytes(running.certificate)
    (tmp_path / "body").write_bytes(b"x" * (LIMIT + 1))
    argv = ["curl", "--http2", "-sS", "-o", "/dev/null", "-D", "-", "--noproxy", "*"]
    argv += ["--cacert", str(tmp_path / "ca.pem"), "--max-time", "20"]
    argv += ["--data-binary", f"@{tmp_path / 'body'}"]
    argv.append(f"https://localhost:{running.port}{PREDICT}")
    done = await trio.run_process(argv, capture_stdout=True, check=False)
    answer = done.stdout.decode().splitlines()
    assert "grpc-status: 8" in answer
    assert f"grpc-message: request longer than {LIMIT} bytes" in answer
    assert backends["a"].seen == []


@pytest.fixture
def clients() -> tuple[bytes, bytes, bytes]:
    """A client that is its own authority, and one that nobody knows."""
    known, public = self_signed("client")
    stranger, _public = self_signed("stranger")
    return known, public, stranger


async def test_clients_without_a_known_certificate_are_refused(
    front_dir, host, backends, rest_server, clients
) -> None:
    known, public, stranger = clients
    config = settings(rest_listen="127.0.0.1:0", client_ca="volume")
    async with front_of(host, front_dir, config, client_ca=public) as running:
        with running.channel(known) as channel:
            assert await running.call(channel, PREDICT) == b"a"
        assert (await running.rest("GET", MODEL, client=known))[0] == 200
        for client in (None, stranger):
            with pytest.raises((ssl.SSLError, OSError)):
                await running.rest("GET", MODEL, client=client)
            with running.channel(client) as channel, pytest.raises(grpc.RpcError):
                await running.call(channel, PREDICT, timeout_s=2)
        assert len(backends["a"].seen) == 1


async def test_too_many_requests_from_one_address_are_refused(
    front_dir, host, backends, rest_server
) -> None:
    config = settings(rest_listen="127.0.0.1:0", client_requests_per_s=5)
    async with front_of(host, front_dir, config) as running:
        codes = set()
        with running.channel() as channel:
            for _ in range(30):
                try:
                    await running.call(channel, PREDICT, size_bytes=10)
                except grpc.RpcError as exc:
                    codes.add(exc.code())
        assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert 0 < len(backends["a"].seen) < 30
        assert (await running.rest("GET", MODEL))[0] == 429


async def test_a_client_that_stops_in_the_middle_is_let_go(
    front_dir, host, backends
) -> None:
    """One that never sends a request, too: nobody waits for it."""
    config = settings(rest_listen="127.0.0.1:0", client_timeout_s=0.5)
    async with front_of(host, front_dir, config) as running:

        def stop_in_the_middle() -> bytes:
            with (
                socket.create_connection(("127.0.0.1", running.rest_port)) as raw,
                running.tls().wrap_socket(raw, server_hostname="localhost") as tls,
            ):
                tls.settimeout(10)
                head = f"POST {MODEL}:predict HTTP/1.1\r\nhost: localhost\r\n"
                tls.sendall(head.encode() + b"content-length: 100\r\n\r\nx")
                return tls.recv(65536)

        answer = await trio.to_thread.run_sync(stop_in_the_middle)
        assert answer.split(b" ")[1] in (b"408", b"503")


async def test_health_is_told_without_a_model_server_to_ask(
    front_dir, host, backends, rest_server
) -> None:
    config = settings(rest_listen="127.0.0.1:0")
    async with front_of(host, front_dir, config) as running:
        assert await running.rest("GET", "/healthz") == (200, "ok")
        await running.front.forget("a")
        assert await running.rest("GET", "/healthz") == (503, "no")
        status, text = await running.rest("GET", MODEL)
        assert (status, text) == (503, '{ "error": "no model server is ready" }')


async def test_the_access_log_names_requests_and_nothing_in_them(
    front_dir, host, backends, rest_server
) -> None:
    config = settings(rest_listen="127.0.0.1:0", access_log=True)
    async with front_of(host, front_dir, config) as running:
        path = f"{MODEL}:predict"
        await running.rest("POST", f"{path}?secret=1", b"CANARY", authorization="TOKEN")
        with running.channel() as channel:
            await running.call(channel, PREDICT, size_bytes=10)
        assert await running.refusal(RELOAD) is grpc.StatusCode.UNIMPLEMENTED
        with trio.fail_after(10):
            while sum("access " in line for line in running.lines) < 3:
                await trio.sleep(0.02)
    text = "\n".join(running.lines)
    assert f"client=127.0.0.1 method=POST path={path} status=200 slot=a" in text
    assert f"path={PREDICT} status=200 slot=a" in text
    for secret in ("secret", "CANARY", "TOKEN", "xxxx"):
        assert secret not in text


async def test_evidence_is_asked_over_http_and_inference_is_not(
    front_dir, host, backends, rest_server
) -> None:
    """The daemon's socket is reached also while no model server is ready."""
    path = "/.well-known/tdxd/evidence"
    (front_dir / "front").mkdir()

    async def answer(stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nquote")

    listening = trio.socket.socket(socket.AF_UNIX)
    await listening.bind(str(front_dir / "front" / "evidence.sock"))
    (front_dir / "front" / "evidence.sock").chmod(0o777)
    listening.listen()
    async with (
        trio.open_nursery() as nursery,
        front_of(host, front_dir, settings(attest=True)) as running,
    ):
        nursery.start_soon(
            trio.serve_listeners, answer, [trio.SocketListener(listening)]
        )
        running.rest_port = running.port
        assert await running.rest("GET", path) == (200, "quote")
        assert await running.rest("POST", path, b"") == (200, "")  # gRPC's refusal
        assert await running.rest("POST", PREDICT, b"") == (200, "")
        with running.channel() as channel:
            assert await running.call(channel, PREDICT) == b"a"
        await running.front.forget("a")
        assert await running.rest("GET", path) == (200, "quote")
        nursery.cancel_scope.cancel()
    assert backends["a"].seen == [PREDICT]
