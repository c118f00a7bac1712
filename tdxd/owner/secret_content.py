"""Checks the content of a named secret before it is stored: a slip shows here, not in the guest.

No error shows a byte of the content: what a library says about it is dropped.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import itertools
from typing import cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from tdxd.core import tls_pem
from tdxd.core.named_secret import SECRET_CONTENT_MAX_BYTES, Content
from tdxd.errors import DataError

__all__ = ["Checked", "check_content"]

_CERTIFICATE = b"CERTIFICATE"
_ENCRYPTED = b"ENCRYPTED PRIVATE KEY"
_LEGACY = b"Proc-Type: 4,ENCRYPTED"
"""RFC 1421, as OpenSSL wrote keys before PKCS #8."""
_PARAMETERS = (b"EC PARAMETERS", b"DH PARAMETERS")
"""Public, and `openssl ecparam -genkey` puts the first before a key."""
_SOON = dt.timedelta(days=14)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What a content is, in one line for people, and what is worth a second look."""

    summary: str
    warnings: tuple[str, ...] = ()


def check_content(
    content: Content, data: bytes, *, source: str, now: dt.datetime
) -> Checked:
    """Check what is to be stored; `source` starts every message.

    Raises: DataError.
    """
    if not 1 <= len(data) <= SECRET_CONTENT_MAX_BYTES:
        size = f"{len(data)} bytes" if data else "nothing"
        raise DataError(f"{source}: {size}, not 1 to {SECRET_CONTENT_MAX_BYTES} bytes")
    if content == "tls-pem":
        return _check_tls_pem(data, source, now)
    if content == "client-ca":
        return _check_client_ca(data, source, now)
    return Checked(summary=f"{len(data)} bytes")


# --- a key with its certificates ----------------------------------------------


def _check_tls_pem(data: bytes, source: str, now: dt.datetime) -> Checked:
    blocks = _blocks(data, source)
    certificates = _certificates(blocks, source)
    keys = [text for label, text in blocks if label.endswith(b"PRIVATE KEY")]
    if len(keys) != 1:
        hint = "one file with the private key, then its certificate, then those that sign it"
        raise DataError(f"{source}: {len(keys)} private keys, not one", hint=hint)
    if any(label == _ENCRYPTED or _LEGACY in text for label, text in blocks):
        hint = "take the passphrase off: openssl pkey -in FILE"
        raise DataError(f"{source}: the private key is encrypted", hint=hint)
    _check_key(keys[0], certificates, source)
    for number, (one, issuer) in enumerate(itertools.pairwise(certificates), start=1):
        if not _issued_by(one, issuer):
            raise DataError(
                f"{source}: certificate {number} ({_name(one)}) is not signed by the one "
                f"after it ({_name(issuer)})",
                hint="the server's certificate first, then each that signs the one before it",
            )
    _check_as_guests_do(data, source)
    leaf = certificates[0]
    summary = f"certificate of {_name(leaf)}, valid to {_day(leaf.not_valid_after_utc)}"
    return Checked(summary=summary, warnings=_dates(certificates, now))


def _check_as_guests_do(data: bytes, source: str) -> None:
    """Refuse what a front would: it must not show only there."""
    try:
        tls_pem.server_certificate(data)
    except DataError as exc:
        raise DataError(f"{source}: {exc.message}") from exc


def _check_key(text: bytes, certificates: list[x509.Certificate], source: str) -> None:
    try:
        spki = _spki(load_pem_private_key(text, None).public_key())
        fits = [_spki(one.public_key()) == spki for one in certificates]
    except (ValueError, TypeError, UnsupportedAlgorithm):
        problem = f"{source}: a key is malformed, or of an unknown kind"
    else:
        if fits[0]:
            return
        problem = f"{source}: the private key is not that of the first certificate"
        if any(fits):
            problem += f", but of certificate {fits.index(True) + 1}"
    # Raised here, outside: the causes hold the key.
    raise DataError(problem, hint="the server's own certificate comes first")


def _spki(key: object) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

    return cast("PublicKeyTypes", key).public_bytes(
        Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    )


def _issued_by(one: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        one.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


# --- the certificates that sign those of clients ------------------------------


def _check_client_ca(data: bytes, source: str, now: dt.datetime) -> Checked:
    blocks = _blocks(data, source)
    if any(label.endswith(b"PRIVATE KEY") for label, _ in blocks):
        raise DataError(
            f"{source}: holds a private key, which no guest may have",
            hint="name the file with the CA's certificate alone",
        )
    certificates = _certificates(blocks, source)
    for number, one in enumerate(certificates, start=1):
        if not _is_ca(one):
            raise DataError(
                f"{source}: certificate {number} ({_name(one)}) is not that of a CA",
                hint="clients show certificates that this one signs: basicConstraints CA:TRUE",
            )
    names = ", ".join(_name(one) for one in certificates)
    return Checked(summary=f"CA {names}", warnings=_dates(certificates, now))


def _is_ca(certificate: x509.Certificate) -> bool:
    """Say whether a certificate may sign others: RFC 5280, sections 4.2.1.3 and 4.2.1.9."""
    try:
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        if not basic.value.ca:
            return False
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    except x509.ExtensionNotFound as exc:
        return exc.oid == x509.KeyUsage.oid
    except (ValueError, x509.DuplicateExtension):
        return False
    return usage.value.key_cert_sign


# --- both ---------------------------------------------------------------------


def _blocks(data: bytes, source: str) -> list[tuple[bytes, bytes]]:
    """Return label and text of each PEM block (RFC 7468); text around them is left alone.

    Raises: DataError.
    """
    try:
        found = tls_pem.parts(data)
    except DataError:
        found = []
    if not found:
        hint = "each -----BEGIN … and -----END … is a line of its own"
        raise DataError(f"{source}: not PEM, or damaged", hint=hint)
    for label, _ in found:
        known = label == _CERTIFICATE or label.endswith(b"PRIVATE KEY")
        if not known and label not in _PARAMETERS:
            raise DataError(f"{source}: holds a block {label.decode()!r}")
    return found


def _certificates(
    blocks: list[tuple[bytes, bytes]], source: str
) -> list[x509.Certificate]:
    made = []
    texts = [text for label, text in blocks if label == _CERTIFICATE]
    for number, text in enumerate(texts, start=1):
        try:
            made.append(x509.load_pem_x509_certificate(text))
        except (ValueError, x509.InvalidVersion) as exc:
            raise DataError(f"{source}: certificate {number} is malformed") from exc
    if not made:
        raise DataError(f"{source}: holds no certificate")
    return made


def _dates(certificates: list[x509.Certificate], now: dt.datetime) -> tuple[str, ...]:
    """Warn of what is not valid now: the clock of this machine may be wrong."""
    warnings = []
    for one in certificates:
        first, last = one.not_valid_before_utc, one.not_valid_after_utc
        if last < now:
            warnings.append(f"certificate of {_name(one)} expired on {_day(last)}")
        elif now < first:
            warnings.append(f"certificate of {_name(one)} is valid from {_day(first)}")
        elif last - now < _SOON:
            warnings.append(f"certificate of {_name(one)} expires on {_day(last)}")
    return tuple(warnings)


def _day(time: dt.datetime) -> str:
    return time.date().isoformat()


def _name(certificate: x509.Certificate) -> str:
    from tdxd.core.showing import shown

    return shown(certificate.subject.rfc4514_string() or "no name", 100)
