"""Asks what answers at an endpoint for evidence, over the TLS connection that it should prove.

Nothing is believed here: the certificate of the connection comes back with the evidence, and
whoever judges both makes that certificate the only root of the channel that data is sent on.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import ssl
import time

import h11

from tdxd.core.config import parse_address
from tdxd.core.endpoint_proof import (
    EVIDENCE_MAX_BYTES,
    NONCE_BYTES,
    EndpointEvidence,
    endpoint_report_data,
    evidence_target,
    key_digest_of_der,
    parse_endpoint_evidence,
)
from tdxd.core.showing import shown
from tdxd.errors import RemoteProtocolError, ServeError, UnavailableError
from tdxd.user.credentials import Identity
from tdxd.user.endpoint import Endpoint

__all__ = ["Proof", "fetch_proof"]

_CHUNK_BYTES = 65536
_RETRY_S = (0.05, 30.0)
_KIND = b"application/msgpack"
_HTTP_OK = 200
_HTTP_BUSY = 503
_NONE_HINT = "the guest's configuration must say attest = true in [serving]"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """Evidence that came over a TLS connection, with what that connection showed.

    `certificate_der` is the certificate whose private key the other end of the connection has;
    `took_s` how long the answer took, most of it the quote.
    """

    nonce: bytes
    certificate_der: bytes
    evidence: EndpointEvidence
    took_s: float

    @property
    def certificate_pem(self) -> bytes:
        """The certificate as PEM: the only root for what is sent afterwards."""
        return ssl.DER_cert_to_PEM_cert(self.certificate_der).encode()

    @property
    def key_sha256(self) -> bytes:
        """SHA-256 of the public key of the connection.

        Raises: DataError.
        """
        return key_digest_of_der(self.certificate_der)

    def report_data(self) -> bytes:
        """Return the 64 bytes that the quote must carry for this very connection and question.

        Raises: DataError.
        """
        return endpoint_report_data(
            nonce=self.nonce,
            key_sha256=self.key_sha256,
            event_log=self.evidence.event_log,
            runtime_log=self.evidence.runtime_log,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """An answer by HTTP; names of `fields` are in lower case."""

    status: int
    fields: dict[bytes, bytes]
    body: bytes

    def header(self, name: bytes) -> bytes:
        """Return a header field, or nothing."""
        return self.fields.get(name, b"")

    def retry_s(self) -> float:
        """Return how long to wait before the next question."""
        least, most = _RETRY_S
        try:
            wanted = float(int(self.header(b"retry-after")))
        except ValueError:
            wanted = 1.0
        return min(max(wanted, least), most)


def fetch_proof(endpoint: Endpoint) -> Proof:
    """Ask for evidence, again while the guest is busy, within the endpoint's timeout.

    With `ca_pem` the certificate must be one that it vouches for, under the endpoint's name;
    without, any certificate is taken as far as here.

    Raises: UnavailableError, ServeError, RemoteProtocolError.
    """
    context = _context(endpoint)
    stop_s = time.monotonic() + endpoint.timeout_s
    while True:
        nonce = os.urandom(NONCE_BYTES)
        began_s = time.monotonic()
        certificate, answer = _exchange(endpoint, context, nonce, stop_s)
        if answer.status != _HTTP_BUSY:
            break
        retry_s = answer.retry_s()
        if time.monotonic() + retry_s > stop_s:
            said = shown(answer.body.decode("ascii", "replace").strip(), 200)
            text = f"{endpoint.address}: no evidence within {endpoint.timeout_s:g} s"
            raise ServeError(f"{text}: {said}", hint="try again later")
        time.sleep(retry_s)
    source = f"{endpoint.address}: evidence"
    if answer.status != _HTTP_OK or answer.header(b"content-type") != _KIND:
        text = f"{source}: HTTP status {answer.status}"
        said = shown(answer.header(b"grpc-message").decode("ascii", "replace"), 200)
        if said:  # the front refuses as a gRPC server does
            text = f"{source}: {said}"
        raise UnavailableError(text, hint=_NONE_HINT)
    evidence = parse_endpoint_evidence(answer.body, source=source)
    return Proof(
        nonce=nonce,
        certificate_der=certificate,
        evidence=evidence,
        took_s=time.monotonic() - began_s,
    )


def _context(endpoint: Endpoint) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    if endpoint.ca_pem is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # the evidence decides, not the certificate
    else:
        context.load_verify_locations(cadata=endpoint.ca_pem.decode("ascii", "replace"))
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC does
    if endpoint.identity is not None:
        _load_identity(context, endpoint.identity)
    return context


def _load_identity(context: ssl.SSLContext, identity: Identity) -> None:
    """Show a certificate; the key goes through memory, as OpenSSL's call wants a path."""
    fd = os.memfd_create("tdxd:identity", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(identity.chain_pem + b"\n" + identity.key_pem)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def _exchange(
    endpoint: Endpoint, context: ssl.SSLContext, nonce: bytes, stop_s: float
) -> tuple[bytes, _Answer]:
    """Return the certificate of a new connection, and the answer that came over it."""
    address = parse_address(endpoint.address)
    name = endpoint.server_name or address.host
    try:
        left_s = max(0.001, stop_s - time.monotonic())
        with (
            socket.create_connection((address.host, address.port), left_s) as plain,
            context.wrap_socket(plain, server_hostname=name) as sock,
        ):
            certificate = sock.getpeercert(binary_form=True)
            if certificate is None:  # pragma: no cover — TLS 1.3 has always one
                raise ssl.SSLError("the server showed no certificate")
            return certificate, _get(sock, name, evidence_target(nonce), stop_s)
    except TimeoutError as exc:
        text = f"{endpoint.address}: no evidence within {endpoint.timeout_s:g} s"
        raise ServeError(
            text, hint="the guest or its host is slow; see --timeout"
        ) from exc
    except ssl.SSLError as exc:
        text = f"{endpoint.address}: no TLS connection: {_reason(exc)}"
        hint = "another server answers, or --ca, --server-name or --cert is another"
        raise UnavailableError(text, hint=hint) from exc
    except OSError as exc:
        text = f"{endpoint.address}: no connection: {exc.strerror or exc}"
        hint = "is the server up, and the address right?"
        raise UnavailableError(text, hint=hint) from exc
    except h11.RemoteProtocolError as exc:
        text = f"{endpoint.address}: evidence: no HTTP answer: {exc}"
        raise RemoteProtocolError(text, hint=_NONE_HINT) from exc


def _reason(exc: ssl.SSLError) -> str:
    if isinstance(exc, ssl.SSLCertVerificationError):
        return exc.verify_message
    return (exc.reason or str(exc)).lower().replace("_", " ")


def _get(sock: ssl.SSLSocket, host: str, target: str, stop_s: float) -> _Answer:
    """Send one GET and return the answer."""
    http = h11.Connection(h11.CLIENT)
    headers = [("Host", host), ("Connection", "close")]
    request = http.send(h11.Request(method="GET", target=target, headers=headers))
    head = http.send(h11.EndOfMessage())
    sock.settimeout(max(0.001, stop_s - time.monotonic()))
    sock.sendall((request or b"") + (head or b""))
    status, fields, body = 0, {}, bytearray()
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            sock.settimeout(max(0.001, stop_s - time.monotonic()))
            http.receive_data(sock.recv(_CHUNK_BYTES))
        elif isinstance(event, h11.Response):
            status = event.status_code
            fields = {name.lower(): value for name, value in event.headers}
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > EVIDENCE_MAX_BYTES:
                text = f"evidence has more than {EVIDENCE_MAX_BYTES} bytes"
                raise RemoteProtocolError(text)
        elif not isinstance(event, h11.InformationalResponse):
            return _Answer(status=status, fields=fields, body=bytes(body))
