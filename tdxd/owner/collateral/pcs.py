"""Fetches collateral from Intel's PCS or from a PCCS, within bounds on time and size.

Nothing fetched is believed: every part is signed under Intel's root and verified afterwards
(`verify`), so a PCCS may be asked over plain http. Intel itself is asked over TLS only.

Source: Intel PCS API version 4: /tdx/certification/v4/tcb, /tdx/certification/v4/qe/identity,
/sgx/certification/v4/pckcrl; the root CRL from Intel's distribution point, or from a PCCS under
/sgx/certification/v4/rootcacrl. Intel PCCS, QuoteGeneration/pccs/controllers: older ones call the
header of the TCB info SGX-TCB-Info-Issuer-Chain, and give CRLs as hex digits.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import ssl
import time
import urllib.parse
from email.message import Message
from pathlib import Path

from tdxd.errors import ConfigError, DataError
from tdxd.owner import bounded_http
from tdxd.owner.collateral.config import INTEL_PCS_URL

__all__ = ["INTEL_PCS_URL", "PcsSource", "check_question", "fetch_collateral"]

INTEL_ROOT_CRL_URL = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"
_TCB_CHAIN = ("TCB-Info-Issuer-Chain", "SGX-TCB-Info-Issuer-Chain")
_IDENTITY_CHAIN = ("SGX-Enclave-Identity-Issuer-Chain",)
_CRL_CHAIN = ("SGX-PCK-CRL-Issuer-Chain",)
_CHAIN_MAX_BYTES = 32768
_API_PATH = re.compile(r"/(sgx|tdx)/certification/v\d+/*$")
"""Intel's own client is configured with this path, ours without."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PcsSource:
    """Where collateral comes from; `timeout_s` is for all requests of one set together.

    `tls_ca` names a PEM file of CAs for https, instead of the system's.
    """

    url: str
    root_crl_url: str | None = None
    timeout_s: float = 10.0
    tls_ca: Path | None = None

    def base(self) -> str:
        """Return the address before /sgx and /tdx."""
        return _API_PATH.sub("", self.url).rstrip("/")

    def root_crl(self) -> str:
        """Return the address of the root CA's revocation list."""
        if self.root_crl_url is not None:
            return self.root_crl_url
        if self.base() == INTEL_PCS_URL:
            return INTEL_ROOT_CRL_URL
        return self.base() + "/sgx/certification/v4/rootcacrl"

    def tls(self) -> ssl.SSLContext | None:
        """Return how https is to be spoken; None stands for the system's CAs.

        Raises: ConfigError.
        """
        return None if self.tls_ca is None else _tls_context(self.tls_ca)


@functools.lru_cache(maxsize=4)
def _tls_context(tls_ca: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(tls_ca))
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError(f"tls_ca {tls_ca}: {exc}") from exc


def check_question(fmspc: str, ca: str) -> None:
    """Raise DataError unless this is 12 upper-case hex digits and "platform" or "processor"."""
    if not re.fullmatch(r"[0-9A-F]{12}", fmspc) or ca not in {"platform", "processor"}:
        raise DataError(
            f"no collateral for the FMSPC {fmspc!r} and CA {ca!r}",
            hint="an FMSPC has 12 upper-case hex digits; the CA is platform or processor",
        )


def fetch_collateral(source: PcsSource, fmspc: str, ca: str) -> str:
    """Fetch one set for a family of platforms and a PCK CA ("platform" or "processor").

    Returns the JSON that `dcap_qvl.QuoteCollateralV3.from_json` reads, without a PCK chain: the
    one in the quote is used.

    Raises: UnavailableError, DataError, ConfigError.
    """
    check_question(fmspc, ca)
    base, tls = source.base(), source.tls()
    stop_s = time.monotonic() + source.timeout_s
    ask = functools.partial(bounded_http.get, stop_s=stop_s, tls=tls)
    tcb, tcb_headers = ask(f"{base}/tdx/certification/v4/tcb?fmspc={fmspc}")
    qe, qe_headers = ask(f"{base}/tdx/certification/v4/qe/identity")
    crl_url = f"{base}/sgx/certification/v4/pckcrl?ca={ca}&encoding=der"
    crl, crl_headers = ask(crl_url)
    root_crl, _ = ask(source.root_crl())
    tcb_info, tcb_signature = _signed(tcb, "tcbInfo")
    identity, identity_signature = _signed(qe, "enclaveIdentity")
    return json.dumps(
        {
            "pck_crl_issuer_chain": _chain(crl_headers, _CRL_CHAIN),
            "root_ca_crl": _der(root_crl, "root CA CRL").hex(),
            "pck_crl": _der(crl, "PCK CRL").hex(),
            "tcb_info_issuer_chain": _chain(tcb_headers, _TCB_CHAIN),
            "tcb_info": tcb_info,
            "tcb_info_signature": tcb_signature,
            "qe_identity_issuer_chain": _chain(qe_headers, _IDENTITY_CHAIN),
            "qe_identity": identity,
            "qe_identity_signature": identity_signature,
        }
    )


def _chain(headers: Message, names: tuple[str, ...]) -> str:
    """Return a PEM chain, which these services send URL-encoded in a header."""
    value = next((headers[name] for name in names if name in headers), None)
    if value is None:
        raise DataError(
            f"collateral: header {' or '.join(names)} is missing",
            hint="does the address belong to a PCS or PCCS of API version 4?",
        )
    chain = urllib.parse.unquote(value, errors="replace")
    if len(chain) > _CHAIN_MAX_BYTES or "-----BEGIN CERTIFICATE-----" not in chain:
        raise DataError(f"collateral: header {names[0]} holds no certificates")
    return chain


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
    if body[:2] in {b"\x30\x81", b"\x30\x82", b"\x30\x83"}:
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
