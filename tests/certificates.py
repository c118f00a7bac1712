"""Certificates for tests."""

from __future__ import annotations

import datetime as dt

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

__all__ = ["self_signed"]


def self_signed(name: str, *, subject: str | None = None) -> tuple[bytes, bytes]:
    """Return (key and certificate, certificate alone) as PEM.

    Clients that trust several need another `subject` for each: that is how they are found.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    common_name = x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, subject or name)
    named = x509.Name([common_name])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(named)
        .issuer_name(named)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(dt.datetime(1970, 1, 1, tzinfo=dt.UTC))
        .not_valid_after(dt.datetime(9999, 12, 31, tzinfo=dt.UTC))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    public = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return private + public, public
