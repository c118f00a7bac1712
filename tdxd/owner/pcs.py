"""Fetches collateral from Intel's PCS or from a PCCS, over HTTP with bounds on time and size.

Source: Intel PCS API version 4: /tdx/certification/v4/tcb, /tdx/certification/v4/qe/identity,
/sgx/certification/v4/pckcrl; the root CRL from Intel's distribution point, or from a PCCS under
/sgx/certification/v4/rootcacrl. Nothing fetched is believed before it is verified.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from email.message import Message

from tdxd.errors import DataError, UnavailableError

__all__ = ["INTEL_PCS_URL", "PcsSource", "fetch_collateral"]

INTEL_PCS_URL = "https://api.trustedservices.intel.com"
INTEL_ROOT_CRL_URL = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"
_MAX_BYTES = 1024 * 1024
_CHUNK_BYTES = 65536


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PcsSource:
    """Where collateral comes from; `timeout_s` is for all requests of one set together."""

    url: str
    root_crl_url: str | None = None
    timeout_s: float = 10.0

    def root_crl(self) -> str:
        """Return the address of the root CA's revocation list."""
        if self.root_crl_url is not None:
            return self.root_crl_url
        if self.url.rstrip("/") == INTEL_PCS_URL:
            return INTEL_ROOT_CRL_URL
        return self.url.rstrip("/") + "/sgx/certification/v4/rootcacrl"


def fetch_collateral(source: PcsSource, fmspc: str, ca: str) -> str:
    """Fetch one set for a family of platforms and a PCK CA ("platform" or "processor").

    Returns the JSON that `dcap_qvl.QuoteCollateralV3.from_json` reads, without a PCK chain: the
    one in the quote is used.

    Raises: UnavailableError, DataError.
    """
    if not re.fullmatch(r"[0-9A-F]{12}", fmspc) or ca not in {"platform", "processor"}:
        raise DataError(f"no collateral for the FMSPC {fmspc!r} and CA {ca!r}")
    base = source.url.rstrip("/")
    stop = time.monotonic() + source.timeout_s
    tcb, tcb_headers = _get(f"{base}/tdx/certification/v4/tcb?fmspc={fmspc}", stop)
    qe, qe_headers = _get(f"{base}/tdx/certification/v4/qe/identity", stop)
    crl_url = f"{base}/sgx/certification/v4/pckcrl?ca={ca}&encoding=der"
    crl, crl_headers = _get(crl_url, stop)
    root_crl, _ = _get(source.root_crl(), stop)
    tcb_info, tcb_signature = _signed(tcb, "tcbInfo")
    identity, identity_signature = _signed(qe, "enclaveIdentity")
    return json.dumps(
        {
            "pck_crl_issuer_chain": _chain(crl_headers, "SGX-PCK-CRL-Issuer-Chain"),
            "root_ca_crl": _der(root_crl, "root CA CRL").hex(),
            "pck_crl": _der(crl, "PCK CRL").hex(),
            "tcb_info_issuer_chain": _chain(tcb_headers, "TCB-Info-Issuer-Chain"),
            "tcb_info": tcb_info,
            "tcb_info_signature": tcb_signature,
            "qe_identity_issuer_chain": _chain(
                qe_headers, "SGX-Enclave-Identity-Issuer-Chain"
            ),
            "qe_identity": identity,
            "qe_identity_signature": identity_signature,
        }
    )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: the owner named the address to be asked."""

    def redirect_request(self, *_args: object, **_kwargs: object) -> None:
        return None


# No proxy from the environment either.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())


def _get(url: str, stop_s: float) -> tuple[bytes, Message]:
    """Fetch one document before the monotonic time `stop_s`."""
    left_s = stop_s - time.monotonic()
    if left_s <= 0:
        raise UnavailableError(f"collateral: no time left for {url}")
    try:
        with _OPENER.open(url, timeout=left_s) as response:
            body = b""
            while chunk := response.read1(_CHUNK_BYTES):
                body += chunk
                if len(body) > _MAX_BYTES:
                    raise DataError(
                        f"collateral: {url} has more than {_MAX_BYTES} bytes"
                    )
                if time.monotonic() > stop_s:
                    raise UnavailableError(f"collateral: {url} takes too long")
            return body, response.headers
    except urllib.error.HTTPError as exc:
        exc.close()
        raise UnavailableError(f"collateral: {url}: HTTP status {exc.code}") from exc
    except (OSError, http.client.HTTPException) as exc:
        reason = getattr(exc, "reason", None) or exc
        raise UnavailableError(f"collateral: {url}: {reason}") from exc


def _chain(headers: Message, name: str) -> str:
    """Return a PEM chain, which these services send URL-encoded in a header."""
    value = headers.get(name)
    if value is None:
        raise DataError(f"collateral: header {name} is missing")
    return urllib.parse.unquote(value)


def _signed(body: bytes, key: str) -> tuple[str, str]:
    """Split `{"KEY":{...},"signature":"HEX"}` into the object's exact text and the signature.

    The signature covers the text as sent, so it must not be decoded and encoded again.
    """
    try:
        text = body.decode()
        start = re.match(rf'\s*\{{\s*"{key}"\s*:\s*', text)
        if start is None:
            raise ValueError("unexpected first key")
        _, end = json.JSONDecoder().raw_decode(text, start.end())
        tail = re.fullmatch(
            r'\s*,\s*"signature"\s*:\s*"([0-9a-fA-F]+)"\s*\}\s*', text[end:]
        )
        if tail is None:
            raise ValueError("unexpected end")
    except (ValueError, RecursionError) as exc:
        raise DataError(f"collateral: {key} is malformed: {exc}") from exc
    return text[start.end() : end], tail[1]


def _der(body: bytes, what: str) -> bytes:
    """Return a CRL as DER; PCS sends DER or PEM, some PCCS versions hex digits."""
    if body.startswith(b"\x30"):
        return body
    try:
        text = body.decode("ascii").strip()
        if text.startswith("-----BEGIN"):
            from cryptography import x509
            from cryptography.hazmat.primitives.serialization import Encoding

            return x509.load_pem_x509_crl(text.encode()).public_bytes(Encoding.DER)
        return bytes.fromhex(text)
    except ValueError as exc:
        raise DataError(f"collateral: {what} is neither DER, PEM nor hex") from exc
