"""From a passphrase to the volume key of a LUKS2 image, all in user space.

Keyslots are tried from the cheapest on, so that costly ones which the host may have added cost
nothing while the genuine one is cheaper; `luks2_json` bounds what all of them may cost together.

Source: LUKS2 On-Disk Format Specification 1.1.1, §3.2 and §3.4; Argon2id: RFC 9106; PBKDF2:
RFC 8018.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import hmac

from tdxd.core.luks2_area import open_area
from tdxd.core.luks2_json import Argon2id, Digest, Pbkdf2
from tdxd.core.luks2_layout import KEY_BYTES, KEYSLOT_AREA_BYTES
from tdxd.core.luks2_read import Luks2Header
from tdxd.core.secret import Secret
from tdxd.errors import BadHeaderError, HostError, WrongPassphraseError

__all__ = ["memory_bytes", "unlock"]


def memory_bytes(header: Luks2Header) -> int:
    """Return how much memory `unlock` takes at most, beside the region itself."""
    areas = 2 * KEYSLOT_AREA_BYTES
    return areas + max(slot.kdf.memory_bytes for slot in header.keyslots)


def unlock(
    header: Luks2Header,
    region: bytes | bytearray,
    passphrase: Secret,
    *,
    source: str,
) -> Secret:
    """Return the 64-byte volume key, whose two XTS halves differ.

    `region` is the file up to its payload, the very bytes that `header` was read from. Takes
    up to some 20 s, without the interpreter's lock.

    Raises: WrongPassphraseError if no keyslot opens; BadHeaderError for a region that is too
    short; HostError with ENOMEM.
    """
    if len(region) < header.payload_offset_bytes:
        raise BadHeaderError(
            f"{source}: ends after {len(region)} bytes, its payload begins at "
            f"{header.payload_offset_bytes}",
            hint="the file is truncated; copy it again",
        )
    for slot in sorted(header.keyslots, key=lambda slot: slot.kdf.cost):
        with _derive(slot.kdf, passphrase, source) as area_key:
            start = slot.area_offset_bytes
            area = bytes(region[start : start + KEYSLOT_AREA_BYTES])
            key = Secret(open_area(area, area_key.reveal()))
        if _is_right(header.digest, key):
            return _checked(key, source)
        key.wipe()
    count = len(header.keyslots)
    raise WrongPassphraseError(
        f"{source}: the passphrase opens none of {count} keyslot{'s' * (count > 1)}",
        hint="is it the passphrase of this image, without a newline at its end?",
    )


def _derive(kdf: Pbkdf2 | Argon2id, passphrase: Secret, source: str) -> Secret:
    salt = base64.b64decode(kdf.salt)
    if isinstance(kdf, Pbkdf2):
        password = passphrase.reveal()
        made = hashlib.pbkdf2_hmac("sha256", password, salt, kdf.iterations, KEY_BYTES)
        return Secret(made)
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id as Kdf

    derivation = Kdf(
        salt=salt,
        length=KEY_BYTES,
        iterations=kdf.time,
        lanes=kdf.cpus,
        memory_cost=kdf.memory,
    )
    try:
        return Secret(derivation.derive(passphrase.reveal()))
    except MemoryError as exc:
        hint = f"its keyslot takes {kdf.memory_bytes} bytes of memory to open"
        raise HostError("unlock", source, errno.ENOMEM, hint=hint) from exc


def _is_right(digest: Digest, key: Secret) -> bool:
    value, salt = base64.b64decode(digest.digest), base64.b64decode(digest.salt)
    found = hashlib.pbkdf2_hmac(
        "sha256", key.reveal(), salt, digest.iterations, len(value)
    )
    return hmac.compare_digest(found, value)


def _checked(key: Secret, source: str) -> Secret:
    """Refuse a key of equal halves, which XTS forbids (FIPS 140-3 IG C.I)."""
    raw, half = key.reveal(), KEY_BYTES // 2
    if raw[:half] != raw[half:]:
        return key
    key.wipe()
    raise BadHeaderError(f"{source}: the two halves of the XTS key are equal")
