"""The key that the store's rows and its audit head are authenticated with.

It is derived from the private half of the key-encryption key, so whoever writes to the database
without that half can neither make a row nor change one: the public half, which is enough to seal a
bundle, does not help.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from tdxd.core.keyrelease import encode_lp
from tdxd.core.secret import Secret

__all__ = ["StoreKey"]

_INFO = b"tdxd/store-mac/v1"


class StoreKey:
    """Authenticates rows: HMAC-SHA256 under HKDF-SHA256(KEK seed, "tdxd/store-mac/v1")."""

    __slots__ = ("_key",)

    def __init__(self, seed: Secret) -> None:
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        derive = HKDF(algorithm=SHA256(), length=32, salt=None, info=_INFO)
        self._key = derive.derive(seed.reveal())

    def mac(self, kind: str, fields: Sequence[bytes | str | int]) -> bytes:
        """Return 32 bytes over LP(kind), then LP of each field; numbers are 8 bytes big-endian."""
        parts = [encode_lp(kind.encode())]
        for field in fields:
            if isinstance(field, int):
                parts.append(encode_lp(field.to_bytes(8, "big")))
            else:
                raw = field.encode() if isinstance(field, str) else field
                parts.append(encode_lp(raw))
        return hmac.digest(self._key, b"".join(parts), "sha256")

    def __repr__(self) -> str:
        return "StoreKey()"
