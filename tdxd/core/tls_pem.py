"""PEM files of TLS: a server's certificates with their key, and the authorities of clients.

Checked before a running server is given one. No error has anything of the files in it.
Source: RFC 7468.
"""

from __future__ import annotations

import hashlib
import re

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from tdxd.errors import DataError

__all__ = ["authorities", "blocks", "parts", "server_certificate"]

_BLOCK = re.compile(
    rb"(?:^|(?<=\A\xef\xbb\xbf))-----BEGIN ([A-Z0-9 ]+)-----[ \t]*\r?\n"
    rb"(?:(?!-----)[^\n]*\n)*-----END \1-----[ \t]*\r?$",
    flags=re.ASCII | re.MULTILINE,
)
"""Each mark is a line of its own: OpenSSL, so HAProxy, reads no other, though parsers do; a
byte order mark before the first is skipped."""
_MARK = b"-----BEGIN "
_ERRORS = (
    ValueError,
    TypeError,
    OverflowError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
)


def parts(pem: bytes) -> list[tuple[bytes, bytes]]:
    """Return label and text of each encapsulated block; text around them is left alone.

    Raises: DataError if one is damaged, or begins or ends within a line.
    """
    found = [(one[1], one[0]) for one in _BLOCK.finditer(pem)]
    if len(found) != pem.count(_MARK):
        text = "a block of the PEM file is damaged, or shares a line with another"
        raise DataError(text)
    return found


def blocks(pem: bytes) -> bytes:
    """Return the encapsulated blocks alone: no text between them, no empty line."""
    found = (match[0].split(b"\n") for match in _BLOCK.finditer(pem))
    lines = (line.strip() for block in found for line in block)
    return b"".join(line + b"\n" for line in lines if line)


def server_certificate(pem: bytes) -> str:
    """Return the SHA-256 of the certificate that a server with this file shows, in hex.

    Raises: DataError if there is none, or no private key in the clear that belongs to it.
    """
    leaf = _certificates(pem)[0]
    keys = [text for label, text in parts(pem) if label.endswith(b"PRIVATE KEY")]
    if len(keys) != 1:
        raise DataError(f"the PEM file has {len(keys)} private keys, not 1")
    try:
        private = load_pem_private_key(keys[0], password=None)
        match = _public(private.public_key()) == _public(leaf.public_key())
    except _ERRORS:
        raise DataError("the private key in the PEM file cannot be used") from None
    if not match:
        raise DataError("the private key in the PEM file is not the certificate's")
    return hashlib.sha256(leaf.public_bytes(Encoding.DER)).hexdigest()


def authorities(pem: bytes) -> int:
    """Return how many certificates there are.

    Raises: DataError if there is none.
    """
    return len(_certificates(pem))


def _certificates(pem: bytes) -> list[x509.Certificate]:
    parts(pem)
    try:
        return x509.load_pem_x509_certificates(pem)
    except _ERRORS:
        raise DataError("no certificate in the PEM file") from None


def _public(key: object) -> bytes:
    encoded: bytes = key.public_bytes(  # type: ignore[attr-defined]
        Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    )
    return encoded
