"""What a client of a serving endpoint asks of the guest behind it, and what proves it.

The client draws a nonce and asks over the very TLS connection whose certificate it wants proved.
The quote in the answer binds the nonce, so that it is fresh, and the public key that the front
serves, so that whoever only passes a genuine quote on, at the other end of a TLS connection of his
own, is found out. The label sets it apart from the quotes of a key release.

Encodings: docs/protocol.md, chapter 6. LP(x) is x after its length as 4 bytes big-endian.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from typing import Literal

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tdxd.core.decode import decode, encode_canonical, plain, strict_map
from tdxd.core.keyrelease import (
    EVENT_LOG_MAX_BYTES,
    NONCE_BYTES,
    QUOTE_MAX_BYTES,
    RUNTIME_LOG_MAX_BYTES,
    encode_lp,
    log_digest,
)
from tdxd.errors import DataError, RemoteProtocolError

__all__ = [
    "EVIDENCE_MAX_BYTES",
    "EVIDENCE_PATH",
    "NONCE_BYTES",
    "EndpointEvidence",
    "endpoint_report_data",
    "evidence_target",
    "key_digest_of_der",
    "key_digest_of_pem",
    "nonce_of_target",
    "parse_endpoint_evidence",
]

EVIDENCE_PATH = "/.well-known/tdxd/evidence"
EVIDENCE_MAX_BYTES = QUOTE_MAX_BYTES + EVENT_LOG_MAX_BYTES + RUNTIME_LOG_MAX_BYTES + 512
"""Cap of one encoded answer: the sum of the caps of its fields, and their names."""
_LABEL = b"tdxd/endpoint/v1"
_X509_ERRORS = (
    ValueError,
    TypeError,
    OverflowError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
)
_KEY_DIGEST_BYTES = 32
_TARGET = re.compile(
    rf"{re.escape(EVIDENCE_PATH)}\?nonce=([0-9a-f]{{{2 * NONCE_BYTES}}})"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EndpointEvidence:
    """The answer of a guest.

    `key_sha256` says which key the guest meant: it is a claim that only serves a better word about
    what went wrong, since the report data is computed from the key that the client itself saw.
    """

    format: Literal[1] = 1
    key_sha256: bytes
    quote: bytes
    event_log: bytes
    runtime_log: bytes

    def __post_init__(self) -> None:
        if len(self.key_sha256) != _KEY_DIGEST_BYTES:
            raise ValueError(f"key_sha256 has {len(self.key_sha256)} bytes, not 32")
        for name, cap in (
            ("quote", QUOTE_MAX_BYTES),
            ("event_log", EVENT_LOG_MAX_BYTES),
            ("runtime_log", RUNTIME_LOG_MAX_BYTES),
        ):
            size = len(getattr(self, name))
            if size > cap:
                raise ValueError(f"{name} has {size} bytes, more than {cap}")

    def encode(self) -> bytes:
        """Return the answer as canonical msgpack."""
        return encode_canonical(plain(self))


def parse_endpoint_evidence(data: bytes, *, source: str) -> EndpointEvidence:
    """Read what `EndpointEvidence.encode` writes, of which there is one form only.

    Raises: RemoteProtocolError, naming `source`.
    """
    value = strict_map(
        data, source=source, max_bytes=EVIDENCE_MAX_BYTES, error=RemoteProtocolError
    )
    evidence = decode(EndpointEvidence, value, source=source, error=RemoteProtocolError)
    if evidence.encode() != data:
        raise RemoteProtocolError(f"{source}: msgpack is not in canonical form")
    return evidence


def endpoint_report_data(
    *, nonce: bytes, key_sha256: bytes, event_log: bytes, runtime_log: bytes
) -> bytes:
    """Return the 64 bytes that the quote must carry.

    `nonce` is the client's, 32 bytes; `key_sha256` the SHA-256 of the SubjectPublicKeyInfo, in DER,
    of the certificate that the TLS connection of the request was made with.
    """
    if len(nonce) != NONCE_BYTES or len(key_sha256) != _KEY_DIGEST_BYTES:
        sizes = f"{len(nonce)} and {len(key_sha256)} bytes"
        raise ValueError(f"nonce and key_sha256 are {sizes}, not 32 each")
    return hashlib.sha512(
        encode_lp(_LABEL)
        + encode_lp(nonce)
        + encode_lp(key_sha256)
        + encode_lp(log_digest(event_log))
        + encode_lp(log_digest(runtime_log))
    ).digest()


def evidence_target(nonce: bytes) -> str:
    """Return what an HTTP request asks for: the path with the nonce in lower-case hex."""
    return f"{EVIDENCE_PATH}?nonce={nonce.hex()}"


def nonce_of_target(target: str) -> bytes | None:
    """Return the nonce of a target exactly as `evidence_target` makes it; else None."""
    found = _TARGET.fullmatch(target)
    return bytes.fromhex(found[1]) if found else None


def key_digest_of_der(certificate: bytes) -> bytes:
    """Return the SHA-256 of a certificate's SubjectPublicKeyInfo.

    Raises: DataError.
    """
    try:
        return _key_digest(x509.load_der_x509_certificate(certificate))
    except _X509_ERRORS as exc:
        raise DataError(f"not a certificate with a usable key: {exc}") from exc


def key_digest_of_pem(pem: bytes) -> bytes:
    """Return the same of the first certificate in a PEM file: the one that a server serves.

    Raises: DataError; the text has nothing of what else stands in the file.
    """
    try:
        return _key_digest(x509.load_pem_x509_certificates(pem)[0])
    except _X509_ERRORS:
        raise DataError("no certificate with a usable key in the PEM file") from None


def _key_digest(certificate: x509.Certificate) -> bytes:
    """Hash the key as it is encoded in the certificate, and no other encoding of it."""
    info = certificate.public_key().public_bytes(
        Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    )
    if info not in certificate.tbs_certificate_bytes:
        raise ValueError("its key is encoded in an unusual way")
    return hashlib.sha256(info).digest()
