"""What the doctor learns of a key server: name, connection, certificate, challenge, in steps."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import socket
import ssl
import time
from typing import Any, Literal

from tdxd.core.config import Address
from tdxd.core.keyrelease import CHALLENGE_PATH, CLOCK_KEY
from tdxd.core.showing import shown
from tdxd.host.facts import Problem
from tdxd.host.rpc import tls_channel

__all__ = ["KeyServerFacts", "ahead", "ask_key_server"]

_STEP_S = 5.0
_TIME_ERRORS = (9, 10)
"""X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED."""
_NAME_ERRORS = (62, 64)
_TEXT_MAX = 200

Step = Literal["name", "connection", "certificate", "challenge", "answered"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KeyServerFacts:
    """How far a conversation went: `step` is the one that failed, unless it is `answered`."""

    server: str
    step: Step
    problem: Problem | None = None
    challenge: bytes = b""
    """The encoded `ChallengeResponse`, not looked into."""
    clock_ahead_s: float | None = None
    """How far this machine's clock is ahead of the server's, if the server tells."""


def ask_key_server(address: Address, ca_pem: bytes) -> KeyServerFacts:
    """Ask for a challenge, and for nothing else; each step takes five seconds at most.

    Only the look-up of the name can take longer: the system's resolver has its own limits.
    """
    server = str(address)
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        text = f"the name {address.host} is not found: {_words(exc)}"
        hint = (
            "is the name right, and does /etc/resolv.conf name a server that answers?"
        )
        return KeyServerFacts(server=server, step="name", problem=Problem(text, hint))
    raw, problem = _connect(found)
    if raw is None:
        return KeyServerFacts(server=server, step="connection", problem=problem)
    with raw:
        problem = _certificate(raw, address.host, ca_pem)
    if problem is not None:
        return KeyServerFacts(server=server, step="certificate", problem=problem)
    return _challenge(address, ca_pem)


def _connect(found: list[Any]) -> tuple[socket.socket | None, Problem | None]:
    """Connect to the first address that answers."""
    problem = None
    for family, kind, protocol, _name, where in found[:4]:
        sock = socket.socket(family, kind, protocol)
        sock.settimeout(_STEP_S)
        try:
            sock.connect(where)
        except OSError as exc:
            sock.close()
            problem = Problem(f"{where[0]} port {where[1]}: {_words(exc)}", _route(exc))
        else:
            return sock, None
    return None, problem


def _route(exc: OSError) -> str:
    if exc.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        return "there is no route: is the network up? ip route"
    if exc.errno == errno.ECONNREFUSED:
        return "nobody listens there: is tdx-keyd running on the owner's machine?"
    return "does a firewall, the cloud's or the owner's, let this guest through?"


def _certificate(raw: socket.socket, host: str, ca_pem: bytes) -> Problem | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    try:
        context.load_verify_locations(cadata=ca_pem.decode("ascii"))
    except (ssl.SSLError, ValueError) as exc:
        return Problem(f"key_release.ca holds no certificate: {_words(exc)}")
    try:
        with context.wrap_socket(raw, server_hostname=host):
            return None
    except ssl.SSLCertVerificationError as exc:
        if exc.verify_code in _TIME_ERRORS:
            hint = "is this machine's clock right? date"
        elif exc.verify_code in _NAME_ERRORS:
            hint = (
                "the certificate has another name: use the one given to tdx-keyd init"
            )
        else:
            hint = "key_release.ca must be the server-ca.pem that tdx-keyd init wrote"
        return Problem(f"its certificate is refused: {exc.verify_message}", hint)
    except OSError as exc:
        return Problem(f"no TLS: {_words(exc)}", "is that the port of tdx-keyd?")


def _challenge(address: Address, ca_pem: bytes) -> KeyServerFacts:
    import grpc

    channel = tls_channel(address, ca_pem)
    began_s = time.time()
    try:
        call: Any = channel.unary_unary(
            CHALLENGE_PATH, request_serializer=None, response_deserializer=None
        )
        answer, done = call.with_call(b"", timeout=_STEP_S)
        told = [*(done.initial_metadata() or ()), *(done.trailing_metadata() or ())]
    except grpc.RpcError as exc:
        failed: Any = exc
        text = f"{failed.code().name}: {shown(failed.details() or '', _TEXT_MAX)}"
        problem = Problem(text, "is that tdx-keyd, of the same version as this tdxd?")
        return KeyServerFacts(server=str(address), step="challenge", problem=problem)
    finally:
        channel.close()
    return KeyServerFacts(
        server=str(address),
        step="answered",
        challenge=bytes(answer),
        clock_ahead_s=ahead(told, (began_s + time.time()) / 2),
    )


def ahead(told: list[Any], now_s: float) -> float | None:
    """Return how far `now_s` is ahead of the time that a server tells in its metadata."""
    for key, value in told:
        if key == CLOCK_KEY:
            with contextlib.suppress(ValueError, OverflowError):
                return now_s - int(value)
    return None


def _words(exc: Exception) -> str:
    text = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
    return shown(text or type(exc).__name__, _TEXT_MAX)
