"""Serve the collateral of the simulated platform over HTTP, in the shape of a PCCS.

Source: Intel PCS API version 4 (paths, header names); Intel PCCS, QuoteGeneration/pccs (status
codes, CRLs as hex unless DER is asked for). Issuer chains are URL-encoded PEM in headers.
"""

from __future__ import annotations

import dataclasses
import http.server
import ipaddress
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable

from tdxd.errors import HostError, UsageError
from tdxd.sim.collateral import Collateral
from tdxd.sim.platform import SimPlatform

__all__ = ["PccsServer"]

_NO_DATA = "No cache data for this platform."
_BAD_REQUEST = "Invalid request parameters."
_FMSPC_DIGITS = 12
_TIMEOUT_S = 10.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One HTTP answer."""

    status: int
    content_type: str
    body: bytes
    header: tuple[str, str] | None = None


class PccsServer:
    """An HTTP server on the loopback interface, in threads of its own.

    `now_s` gives the seconds since 1970 at which each answer's collateral is signed.
    """

    def __init__(
        self,
        platform: SimPlatform,
        host: str,
        port: int,
        *,
        now_s: Callable[[], int] = lambda: int(time.time()),
    ) -> None:
        """Bind and start; port 0 takes any free one.

        Raises: HostError; UsageError if `host` is not a loopback address.
        """
        address = _loopback(host)

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            address_family = socket.AF_INET6 if address.version == 6 else socket.AF_INET

        handler = _handler_class(lambda: platform.collateral(now_s()), platform.fmspc)
        try:
            self._server = Server((str(address), port), handler)
        except OSError as exc:
            raise HostError.of("bind", f"{host}:{port}", exc) from exc
        bound = self._server.server_address[1]
        self.url = f"http://{_bracketed(address)}:{bound}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="pccs", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop answering; harmless when repeated."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def answer(
    path: str, query: dict[str, str], collateral: Collateral, fmspc: str
) -> Answer:
    """Return what a PCCS says to one GET request."""
    routes = {
        "/sgx/certification/v4/pckcrl": _pck_crl,
        "/sgx/certification/v4/rootcacrl": _root_crl,
        "/tdx/certification/v4/tcb": _tcb_info,
        "/tdx/certification/v4/qe/identity": _qe_identity,
    }
    route = routes.get(path)
    if route is None:
        return _text(404, "Not Found")
    return route(query, collateral, fmspc)


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
        _chain("TCB-Info-Issuer-Chain", collateral.tcb_info_issuer_chain),
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
    collateral: Callable[[], Collateral], fmspc: str
) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = _TIMEOUT_S

        def do_GET(self) -> None:
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query))
            reply = answer(url.path, query, collateral(), fmspc)
            self.send_response(reply.status)
            self.send_header("Content-Type", reply.content_type)
            self.send_header("Content-Length", str(len(reply.body)))
            if reply.header is not None:
                self.send_header(*reply.header)
            self.end_headers()
            self.wfile.write(reply.body)

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
