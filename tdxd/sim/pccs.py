"""Serve the collateral of the simulated platform over HTTP, in the shape of a PCCS or of a PCS.

Source: Intel PCS API version 4 (paths, header names; CRLs as PEM or DER); Intel PCCS,
QuoteGeneration/pccs/controllers (status codes, CRLs as hex unless DER is asked for; older ones
always hex, and another header name). Issuer chains are URL-encoded PEM in headers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import ipaddress
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Literal

from tdxd.errors import HostError, UsageError
from tdxd.sim.collateral import Collateral
from tdxd.sim.platform import SimPlatform

__all__ = ["Answer", "Dialect", "PccsServer"]

_NO_DATA = "No cache data for this platform."
_BAD_REQUEST = "Invalid request parameters."
_FMSPC_DIGITS = 12
_TCB_CHAIN = "TCB-Info-Issuer-Chain"
_TIMEOUT_S = 10.0
_POLL_S = 0.05
"""So soon it ends."""
Dialect = Literal["pccs", "old-pccs", "pcs"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One HTTP answer; `drip_s` is slept before each byte of it, headers included."""

    status: int
    content_type: str
    body: bytes
    header: tuple[str, str] | None = None
    drip_s: float = 0.0


ChangeAnswer = Callable[[str, Answer], Answer]
"""Makes of the right answer to a path the one that a broken or lying service gives."""


class PccsServer:
    """An HTTP server on the loopback interface, in threads of its own.

    `now_s` gives the seconds since 1970 at which each answer's collateral is signed; `change` may
    spoil answers.
    """

    def __init__(
        self,
        platform: SimPlatform,
        host: str,
        port: int,
        *,
        now_s: Callable[[], int] = lambda: int(time.time()),
        dialect: Dialect = "pccs",
        change: ChangeAnswer = lambda _path, right: right,
    ) -> None:
        """Bind and start; port 0 takes any free one.

        Raises: HostError; UsageError if `host` is not a loopback address.
        """
        address = _loopback(host)

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            address_family = socket.AF_INET6 if address.version == 6 else socket.AF_INET

        def respond(target: str) -> Answer:
            url = urllib.parse.urlsplit(target)
            query = dict(urllib.parse.parse_qsl(url.query))
            signed = platform.collateral(now_s())
            right = answer(url.path, query, signed, platform.fmspc, dialect)
            return change(url.path, right)

        self._ending = threading.Event()
        handler = _handler_class(respond, self._ending)
        try:
            self._server = Server((str(address), port), handler)
        except OSError as exc:
            raise HostError.of("bind", f"{host}:{port}", exc) from exc
        bound = self._server.server_address[1]
        self.url = f"http://{_bracketed(address)}:{bound}"
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            args=(_POLL_S,),
            name="pccs",
            daemon=True,
        )
        self._thread.start()

    def close(self) -> None:
        """Stop answering; harmless when repeated."""
        self._ending.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def answer(
    path: str,
    query: dict[str, str],
    collateral: Collateral,
    fmspc: str,
    dialect: Dialect = "pccs",
) -> Answer:
    """Return what a PCCS, or Intel's PCS, says to one GET request."""
    routes = {
        "/sgx/certification/v4/pckcrl": _pck_crl,
        "/sgx/certification/v4/rootcacrl": _root_crl,
        "/tdx/certification/v4/tcb": _tcb_info,
        "/tdx/certification/v4/qe/identity": _qe_identity,
    }
    route = routes.get(path)
    if route is None:
        return _text(404, "Not Found")
    return _in_dialect(route(query, collateral, fmspc), dialect)


def _in_dialect(plain: Answer, dialect: Dialect) -> Answer:
    """Change what a PCCS of today says to what the other services say."""
    if dialect == "old-pccs" and plain.header is not None:
        name, value = plain.header
        renamed = "SGX-TCB-Info-Issuer-Chain" if name == _TCB_CHAIN else name
        plain = dataclasses.replace(plain, header=(renamed, value))
    if dialect == "old-pccs" and plain.body.startswith(b"\x30"):
        return dataclasses.replace(plain, body=plain.body.hex().encode())
    if dialect == "pcs" and plain.body[:2] == b"30":  # hex digits of DER
        return dataclasses.replace(plain, body=bytes.fromhex(plain.body.decode()))
    return plain


def _pck_crl(query: dict[str, str], collateral: Collateral, fmspc: str) -> Answer:
    del fmspc
    authority = query.get("ca", "").lower()
    if authority not in ("platform", "processor"):
        return _text(400, _BAD_REQUEST)
    if authority == "processor":
        return _text(404, _NO_DATA)
    der = query.get("encoding", "").lower() == "der"
    crl = collateral.pck_crl
    return Answer(
        status=200,
        content_type="application/pkix-crl" if der else "application/x-pem-file",
        body=crl if der else crl.hex().encode(),
        header=_chain("SGX-PCK-CRL-Issuer-Chain", collateral.pck_crl_issuer_chain),
    )


def _root_crl(query: dict[str, str], collateral: Collateral, fmspc: str) -> Answer:
    del query, fmspc
    return _text(200, collateral.root_ca_crl.hex())


def _tcb_info(query: dict[str, str], collateral: Collateral, fmspc: str) -> Answer:
    wanted = query.get("fmspc", "")
    if len(wanted) != _FMSPC_DIGITS:
        return _text(400, _BAD_REQUEST)
    if wanted.upper() != fmspc:
        return _text(404, _NO_DATA)
    return _signed(
        "tcbInfo",
        collateral.tcb_info,
        collateral.tcb_info_signature,
        _chain(_TCB_CHAIN, collateral.tcb_info_issuer_chain),
    )


def _qe_identity(query: dict[str, str], collateral: Collateral, fmspc: str) -> Answer:
    del query, fmspc
    chain = collateral.qe_identity_issuer_chain
    return _signed(
        "enclaveIdentity",
        collateral.qe_identity,
        collateral.qe_identity_signature,
        _chain("SGX-Enclave-Identity-Issuer-Chain", chain),
    )


def _signed(
    name: str, document: str, signature: bytes, header: tuple[str, str]
) -> Answer:
    # The signature covers the exact bytes of the document, so it is pasted, not re-encoded.
    body = f'{{"{name}":{document},"signature":"{signature.hex()}"}}'
    return Answer(
        status=200,
        content_type="application/json; charset=utf-8",
        body=body.encode(),
        header=header,
    )


def _chain(name: str, pem: str) -> tuple[str, str]:
    return name, urllib.parse.quote(pem, safe="")


def _text(status: int, text: str) -> Answer:
    return Answer(
        status=status, content_type="text/html; charset=utf-8", body=text.encode()
    )


def _handler_class(
    respond: Callable[[str], Answer], ending: threading.Event
) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = _TIMEOUT_S

        def do_GET(self) -> None:
            reply = respond(self.path)
            if reply.drip_s:
                self._drip(reply)
                return
            self.send_response(reply.status)
            self.send_header("Content-Type", reply.content_type)
            self.send_header("Content-Length", str(len(reply.body)))
            if reply.header is not None:
                self.send_header(*reply.header)
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # too much for the other side
                self.wfile.write(reply.body)

        def _drip(self, reply: Answer) -> None:
            self.close_connection = True
            size = len(reply.body)
            head = f"HTTP/1.1 {reply.status} OK\r\nContent-Length: {size}\r\n\r\n"
            with contextlib.suppress(ConnectionError):
                for byte in head.encode() + reply.body:
                    if ending.wait(reply.drip_s):
                        return
                    self.wfile.write(bytes([byte]))

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing: stdout and stderr belong to the program."""

    return Handler


def _loopback(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        raise UsageError(f"{host!r} is not an IP address", hint="127.0.0.1") from None
    if not address.is_loopback:
        hint = "the simulator's collateral is for tests on one machine: 127.0.0.1"
        raise UsageError(f"{host} is not a loopback address", hint=hint)
    return address


def _bracketed(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    return f"[{address}]" if address.version == 6 else str(address)
