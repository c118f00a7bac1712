"""A TLS channel to a serving endpoint, and what its refusals mean for a person."""

from __future__ import annotations

import dataclasses
from typing import Any

import grpc

from tdxd.core.config import parse_address
from tdxd.errors import (
    DataError,
    NotAllowedError,
    NotAttestedError,
    RemoteProtocolError,
    ServeError,
    TdxdError,
    UnavailableError,
    UsageError,
)
from tdxd.user.credentials import Identity, read_ca

__all__ = ["MAX_MESSAGE_BYTES", "Endpoint", "call_error", "open_channel", "read_ca"]

MAX_MESSAGE_BYTES = 64 << 20
_SLACK_BYTES = 1 << 20
_Option = tuple[str, str | int]
# What gRPC says when the server ends a connection after the handshake, as one does under TLS 1.3
# that wants another certificate of its client: gRPC does not pass on the alert.
_HUNG_UP = ("Unwrap failed", "Socket closed", "onnection reset")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where to call, and whom to believe: only what `ca_pem` signed, under `server_name`.

    Without `server_name` the certificate must name the address's host. Without `ca_pem` there is
    no TLS at all, and nobody is believed or kept out. `identity` is what the client shows.
    `attested`: `ca_pem` is the certificate with which the endpoint proved itself.
    """

    address: str
    ca_pem: bytes | None
    server_name: str | None = None
    timeout_s: float = 60.0
    identity: Identity | None = None
    attested: bool = False

    def __post_init__(self) -> None:
        try:
            parse_address(self.address)
        except ValueError as exc:
            raise UsageError(str(exc), hint="for example localhost:8500") from exc
        if not self.timeout_s > 0:
            raise UsageError(f"timeout {self.timeout_s} is not greater than 0")

    @property
    def channel_kind(self) -> str:
        """`secure` or `insecure`, as the reference calls a channel."""
        return "insecure" if self.ca_pem is None else "secure"


def open_channel(endpoint: Endpoint) -> grpc.Channel:
    """Open a channel with a connection of its own; it connects at the first call."""
    options: list[_Option] = [
        # Otherwise channels to one address share one connection.
        ("grpc.use_local_subchannel_pool", 1),
        # No proxy that the environment names may stand between us and the server.
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 0),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES + _SLACK_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES + _SLACK_BYTES),
    ]
    if endpoint.ca_pem is None:
        return grpc.insecure_channel(endpoint.address, options=options)
    if endpoint.server_name is not None:
        options.append(("grpc.ssl_target_name_override", endpoint.server_name))
    identity = endpoint.identity
    credentials = grpc.ssl_channel_credentials(
        root_certificates=endpoint.ca_pem,
        private_key=identity.key_pem if identity else None,
        certificate_chain=identity.chain_pem if identity else None,
    )
    return grpc.secure_channel(endpoint.address, credentials, options=options)


def call_error(exc: Any, endpoint: Endpoint) -> TdxdError:
    """Return the error of ours for a `grpc.RpcError`, in the server's words, with a hint."""
    code, details = exc.code(), (exc.details() or "").strip()
    if code is grpc.StatusCode.UNAVAILABLE:
        return _unavailable(endpoint, details)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        text = f"{endpoint.address}: no answer within {endpoint.timeout_s:g} s"
        return ServeError(text, hint="the server is busy or slow; see --timeout")
    kind, hint = _KINDS.get(code, (ServeError, "the server's log says more"))
    return kind(f"{endpoint.address}: {code.name}: {details}", hint=hint)


_Code = grpc.StatusCode
_KINDS: dict[grpc.StatusCode, tuple[type[TdxdError], str]] = {
    _Code.INVALID_ARGUMENT: (
        DataError,
        "compare names, types and shapes of the inputs with the model's signature",
    ),
    _Code.FAILED_PRECONDITION: (DataError, "see --signature"),
    _Code.NOT_FOUND: (
        UnavailableError,
        "see --model and --version; a server answers for a model once it is loaded",
    ),
    _Code.UNAUTHENTICATED: (NotAllowedError, "the server wants to know its callers"),
    _Code.PERMISSION_DENIED: (NotAllowedError, "the front lets only inference pass"),
    _Code.UNIMPLEMENTED: (
        RemoteProtocolError,
        "is this the address of a model server's gRPC port?",
    ),
    _Code.RESOURCE_EXHAUSTED: (
        ServeError,
        f"messages may have {MAX_MESSAGE_BYTES >> 20} MiB; a server may also limit calls",
    ),
}


def _unavailable(endpoint: Endpoint, details: str) -> TdxdError:
    address = endpoint.address
    if "CERTIFICATE_VERIFY_FAILED" in details and endpoint.attested:
        text = f"{address}: the server's certificate is not the one that was attested"
        hint = "it has just been changed, or another server answers: attest again"
        return NotAttestedError(text, hint=hint)
    if "CERTIFICATE_VERIFY_FAILED" in details:
        text = f"{address}: the server's certificate is not one that --ca vouches for"
        return UnavailableError(text, hint="another server answers, or --ca is another")
    if endpoint.ca_pem is not None and any(one in details for one in _HUNG_UP):
        text = f"{address}: the server hung up: {_last_error(details)}"
        wants = "does it want its clients to have certificates (--cert)"
        if endpoint.identity:
            wants = "does it believe the certificate of --cert"
        return UnavailableError(text, hint=f"{wants}, or is it stopping?")
    if ("ostname" in details and "erif" in details) or "Peer name" in details:
        name = endpoint.server_name or parse_address(address).host
        text = f"{address}: the server's certificate does not name {name!r}"
        return UnavailableError(
            text, hint="--server-name NAME, if another name is right"
        )
    if "andshake" in details or "SSL" in details:
        text = f"{address}: no TLS connection: {_last_error(details)}"
        return UnavailableError(text, hint="does a TLS server for gRPC listen there?")
    text = f"{address}: no connection: {_last_error(details)}"
    return UnavailableError(text, hint="is the server up, and the address right?")


def _last_error(details: str) -> str:
    """Keep of gRPC's chain of errors what comes last, which is the cause."""
    return details.rpartition("last error: ")[2][:300] or "no reason given"
