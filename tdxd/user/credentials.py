"""Whom a client believes, and who it says that it is: certificates and keys from PEM files."""

from __future__ import annotations

import dataclasses
import re

from tdxd.errors import DataError, HostError

__all__ = ["Identity", "read_ca", "read_identity"]

_CERTIFICATE = re.compile(
    rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\n?", re.DOTALL
)
_KEY = re.compile(
    rb"-----BEGIN ([A-Z ]*PRIVATE KEY)-----.+?-----END \1-----\n?", re.DOTALL
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A client's certificates, its own first, and the private key to the first."""

    chain_pem: bytes
    key_pem: bytes = dataclasses.field(repr=False)


def read_ca(path: str) -> bytes:
    """Return the certificates of a PEM file; a private key beside them is left out.

    Raises: HostError, DataError.
    """
    return _certificates(path, _read(path))


def read_identity(chain_path: str, key_path: str | None = None) -> Identity:
    """Read a client's certificate and its key; without `key_path` one file holds both.

    Raises: HostError, DataError for what is no PEM file, an encrypted key, or another's key.
    """
    content = _read(chain_path)
    chain_pem = _certificates(chain_path, content)
    where = key_path or chain_path
    key_pem = _key(where, _read(key_path) if key_path else content)
    _check_pair(chain_path, chain_pem, where, key_pem)
    return Identity(chain_pem=chain_pem, key_pem=key_pem)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as exc:
        raise HostError.of("read", path, exc) from exc


def _certificates(path: str, content: bytes) -> bytes:
    found = b"".join(_CERTIFICATE.findall(content))
    if not found:
        raise DataError(f"{path}: no certificate in it", hint="a PEM file is expected")
    return found


def _key(path: str, content: bytes) -> bytes:
    found = _KEY.search(content)
    if found is None:
        hint = "a PEM file is expected; --key names it, if --cert's file has no key"
        raise DataError(f"{path}: no private key in it", hint=hint)
    text = found[0]
    if b"ENCRYPTED" in text:
        hint = "openssl pkey -in FILE -out NEW, with umask 077, writes one without"
        raise DataError(f"{path}: its private key has a passphrase", hint=hint)
    return text


def _check_pair(chain_path: str, chain_pem: bytes, key_path: str, key: bytes) -> None:
    """Compare public keys: TLS itself would only say that the handshake failed."""
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        certified = x509.load_pem_x509_certificates(chain_pem)[0].public_key()
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise DataError(f"{chain_path}: not a certificate: {exc}") from exc
    try:
        own = load_pem_private_key(key, None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # Whatever the reason says, it may quote the key.
        raise DataError(f"{key_path}: not a private key") from None
    if certified != own:
        text = f"{key_path}: not the private key to the certificate in {chain_path}"
        raise DataError(text, hint="the first certificate of the file counts")
