"""Asking for evidence: what a hostile or a busy server can make of it."""

from __future__ import annotations

import contextlib
import itertools
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tdxd.core.endpoint_proof import (
    EVIDENCE_MAX_BYTES,
    EndpointEvidence,
    key_digest_of_pem,
)
from tdxd.errors import (
    NotAttestedError,
    RemoteProtocolError,
    ServeError,
    TdxdError,
    UnavailableError,
)
from tdxd.user.attested import fetch_proof
from tdxd.user.credentials import read_identity
from tdxd.user.endpoint import Endpoint, _unavailable
from tests.certificates import self_signed

EVIDENCE = EndpointEvidence(
    key_sha256=b"k" * 32, quote=b"quote", event_log=b"", runtime_log=b""
)
Answer = Callable[[ssl.SSLSocket, bytes], None]


class Server:
    """A TLS server that does what a test wants with each connection."""

    def __init__(self, answer: Answer, *, client_ca: bytes = b"") -> None:
        self.pem, self.public = self_signed("localhost")
        self.seen: list[bytes] = []
        self._answer = answer
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.NamedTemporaryFile() as file:
            file.write(self.pem)
            file.flush()
            self._context.load_cert_chain(file.name)
        if client_ca:
            self._context.load_verify_locations(cadata=client_ca.decode())
            self._context.verify_mode = ssl.CERT_REQUIRED
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"localhost:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run)

    @contextlib.contextmanager
    def running(self) -> Iterator[Server]:
        self._thread.start()
        try:
            yield self
        finally:
            self._socket.shutdown(socket.SHUT_RDWR)
            self._thread.join(20)
            self._socket.close()

    def _run(self) -> None:
        while True:
            try:
                plain, _peer = self._socket.accept()
            except OSError:
                return
            with plain, contextlib.suppress(OSError):
                plain.settimeout(20)
                with self._context.wrap_socket(plain, server_side=True) as client:
                    request = client.recv(65536)
                    self.seen.append(request)
                    self._answer(client, request)


def answering(*answers: bytes) -> Answer:
    """Give these in turn, the last one ever after."""
    rest = itertools.chain(answers, itertools.repeat(answers[-1]))
    return lambda client, _request: client.sendall(next(rest))


def http(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    kind = "Content-Type: application/msgpack"
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", kind, *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def endpoint(server: Server, **changes: object) -> Endpoint:
    fields = {"ca_pem": None, "timeout_s": 20.0, **changes}
    return Endpoint(address=server.address, **fields)  # type: ignore[arg-type]


def asked(answer: Answer, **changes: object) -> TdxdError:
    with Server(answer).running() as server, pytest.raises(TdxdError) as caught:
        fetch_proof(endpoint(server, **changes))
    return caught.value


def test_it_brings_the_certificate_of_its_connection() -> None:
    with Server(answering(http(EVIDENCE.encode()))).running() as server:
        proof = fetch_proof(endpoint(server))
        again = fetch_proof(endpoint(server))
    assert proof.evidence == EVIDENCE
    assert proof.key_sha256 == key_digest_of_pem(server.public)
    assert proof.certificate_pem == server.public
    assert proof.nonce != again.nonce
    wanted = f"GET /.well-known/tdxd/evidence?nonce={proof.nonce.hex()} HTTP/1.1"
    assert server.seen[0].startswith(wanted.encode())


def test_a_busy_guest_is_asked_again_with_another_nonce() -> None:
    busy = http(b"busy\n", "503 Busy", "Retry-After: 0")
    answer = answering(busy, busy, http(EVIDENCE.encode()))
    with Server(answer).running() as server:
        assert fetch_proof(endpoint(server)).evidence == EVIDENCE
    assert len({one.split(b" ")[1] for one in server.seen}) == 3


def test_a_guest_that_stays_busy_is_told_with_its_words() -> None:
    busy = http(b"too many\n", "503 Busy", "Retry-After: 86400")
    error = asked(answering(busy), timeout_s=1.0)
    assert isinstance(error, ServeError)
    assert "no evidence within 1 s: too many" in error.message


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        (http(b"", "404 Not Found"), UnavailableError, "HTTP status 404"),
        (http(b"", "301 Moved", "Location: /"), UnavailableError, "status 301"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", UnavailableError, "200"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\ngrpc-message: not here\r\n\r\n",
            UnavailableError,
            "evidence: not here",
        ),
        (http(b"<html>"), RemoteProtocolError, "evidence"),
        (http(b""), RemoteProtocolError, "evidence"),
        (b"\x00\x00\x12\x04\x00\x00\x00\x00\x00", RemoteProtocolError, "no HTTP"),
        (http(b"x" * 10)[:-5], RemoteProtocolError, "no HTTP"),
        (b"", RemoteProtocolError, "no HTTP"),
    ],
)
def test_what_is_no_evidence(answer: bytes, kind: type[TdxdError], text: str) -> None:
    error = asked(answering(answer))
    assert isinstance(error, kind)
    assert text in error.message


def test_an_endless_answer_ends() -> None:
    def endless(client: ssl.SSLSocket, _request: bytes) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            client.sendall(bytes(65536))

    error = asked(endless)
    assert isinstance(error, RemoteProtocolError)
    assert f"more than {EVIDENCE_MAX_BYTES} bytes" in error.message


def test_a_slow_answer_ends() -> None:
    """Time is for the whole answer: a byte now and then does not extend it."""
    ended = threading.Event()

    def slow(client: ssl.SSLSocket, _request: bytes) -> None:
        for byte in http(EVIDENCE.encode()):
            client.sendall(bytes([byte]))
            if ended.wait(0.02):
                return

    began_s = time.monotonic()
    with Server(slow).running() as server:
        with pytest.raises(ServeError, match=r"no evidence within 0\.3 s"):
            fetch_proof(endpoint(server, timeout_s=0.3))
        ended.set()
    assert time.monotonic() - began_s < 10


def test_a_long_head_ends() -> None:
    error = asked(answering(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 300_000))
    assert isinstance(error, RemoteProtocolError)


def test_a_server_that_speaks_no_tls_1_3() -> None:
    server = Server(answering(http(EVIDENCE.encode())))
    server._context.maximum_version = ssl.TLSVersion.TLSv1_2
    with server.running(), pytest.raises(UnavailableError, match="no TLS connection"):
        fetch_proof(endpoint(server))
    assert server.seen == []


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(UnavailableError, match="no connection"):
        fetch_proof(Endpoint(address=f"127.0.0.1:{port}", ca_pem=None, timeout_s=5))


def test_a_ca_and_its_name_count_where_they_are_given() -> None:
    with Server(answering(http(EVIDENCE.encode()))).running() as server:
        fetch_proof(endpoint(server, ca_pem=server.public))
        other = self_signed("localhost")[1]
        with pytest.raises(UnavailableError, match="self-signed"):
            fetch_proof(endpoint(server, ca_pem=other))
        with pytest.raises(UnavailableError, match="ostname"):
            fetch_proof(endpoint(server, ca_pem=server.public, server_name="other"))
    assert len(server.seen) == 1


def test_a_client_shows_its_own_certificate(tmp_path: Path) -> None:
    private, public = self_signed("client")
    path = tmp_path / "client.pem"
    path.write_bytes(private)
    answer = answering(http(EVIDENCE.encode()))
    with Server(answer, client_ca=public).running() as server:
        identity = read_identity(str(path))
        assert fetch_proof(endpoint(server, identity=identity)).evidence == EVIDENCE
        with pytest.raises(TdxdError):
            fetch_proof(endpoint(server))


def test_a_changed_certificate_is_told_apart_from_a_wrong_ca() -> None:
    details = "CERTIFICATE_VERIFY_FAILED: self signed certificate"
    attested = Endpoint(address="h:1", ca_pem=b"x", attested=True)
    error = _unavailable(attested, details)
    assert isinstance(error, NotAttestedError)
    assert "attest again" in error.hint
    usual = _unavailable(Endpoint(address="h:1", ca_pem=b"x"), details)
    assert isinstance(usual, UnavailableError)
