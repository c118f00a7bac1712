"""HPKE (RFC 9180) with the one suite that the protocol allows, and its key pairs on the wire.

Suite: KEM MLKEM768-X25519 (0x647A, a hybrid: safe while either part is), HKDF-SHA256 (0x0001),
AES-256-GCM (0x0002), base mode. A ciphertext is 1136 bytes longer than its plaintext.
Encapsulation draws its randomness inside the cryptography library; key pairs come from seeds that
the caller passes in.
"""

from __future__ import annotations

import dataclasses
import functools

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import (
    MLKEM768PrivateKey,
    MLKEM768PublicKey,
)
from cryptography.hazmat.primitives.asymmetric.x25519 import (
    X25519PrivateKey,
    X25519PublicKey,
)
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from tdxd.core.secret import Secret
from tdxd.errors import RemoteProtocolError, TdxdError

__all__ = [
    "OVERHEAD_BYTES",
    "PUBLIC_KEY_BYTES",
    "SEED_BYTES",
    "KeyPair",
    "key_pair",
    "open_sealed",
    "parse_public_key",
    "seal",
]

MLKEM_PUBLIC_BYTES = 1184
X25519_BYTES = 32
PUBLIC_KEY_BYTES = MLKEM_PUBLIC_BYTES + X25519_BYTES
MLKEM_SEED_BYTES = 64
SEED_BYTES = MLKEM_SEED_BYTES + X25519_BYTES
OVERHEAD_BYTES = 1088 + 32 + 16
"""ML-KEM-768 ciphertext, X25519 share, GCM tag."""

_P = 2**255 - 19
_LOW_ORDER = frozenset(
    (
        0,
        1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
        _P - 1,
    )
)
"""u-coordinates below p of points of order 1, 2, 4 and 8. Source: RFC 7748, section 7; the list is
that of "Curve25519: new Diffie-Hellman speed records", FAQ "validate public keys"."""


@functools.cache  # making one costs as much as using it
def _suite() -> Suite:
    return Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class KeyPair:
    """A private key, and its public half in wire form: 1216 bytes."""

    private: MLKEM768X25519PrivateKey
    public: bytes


def key_pair(seed: Secret) -> KeyPair:
    """Make the key pair of a 96-byte seed: ML-KEM seed d || z (64), X25519 private key (32)."""
    raw = seed.reveal()
    assert len(raw) == SEED_BYTES
    mlkem = MLKEM768PrivateKey.from_seed_bytes(raw[:MLKEM_SEED_BYTES])
    x25519 = X25519PrivateKey.from_private_bytes(raw[MLKEM_SEED_BYTES:])
    public = (
        mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()
    )
    return KeyPair(private=MLKEM768X25519PrivateKey(mlkem, x25519), public=public)


def parse_public_key(
    data: bytes, *, error: type[TdxdError] = RemoteProtocolError
) -> MLKEM768X25519PublicKey:
    """Parse ML-KEM-768 (1184 bytes) || X25519 (32 bytes), in their one canonical form.

    Refused: other sizes, ML-KEM coefficients of 3329 or more, an X25519 value with its high bit
    set or not below 2^255 - 19, and points of low order, zero among them.

    Raises: `error`.
    Source: FIPS 203, section 7.2 (modulus check); RFC 7748, sections 5 and 6.1.
    """
    if len(data) != PUBLIC_KEY_BYTES:
        raise error(f"public key has {len(data)} bytes, not {PUBLIC_KEY_BYTES}")
    share = data[MLKEM_PUBLIC_BYTES:]
    value = int.from_bytes(share, "little")
    if value >= _P:
        raise error("public key: the X25519 point is not in canonical form")
    if value in _LOW_ORDER:
        raise error("public key: the X25519 point has a low order")
    try:
        mlkem = MLKEM768PublicKey.from_public_bytes(data[:MLKEM_PUBLIC_BYTES])
    except ValueError as exc:
        raise error("public key: the ML-KEM-768 part is not valid") from exc
    return MLKEM768X25519PublicKey(mlkem, X25519PublicKey.from_public_bytes(share))


def seal(plaintext: bytes, public_key: MLKEM768X25519PublicKey, info: bytes) -> bytes:
    """Seal to a public key; `info` must be the same at opening."""
    return _suite().encrypt(plaintext, public_key, info=info)


def open_sealed(
    sealed: bytes,
    private: MLKEM768X25519PrivateKey,
    info: bytes,
    *,
    error: type[TdxdError],
    what: str,
) -> bytes:
    """Open what `seal` made, for this key and this `info`.

    Raises: `error`, naming `what`.
    """
    try:
        return _suite().decrypt(sealed, private, info=info)
    except (InvalidTag, ValueError) as exc:
        raise error(f"{what} does not open with this key") from exc
