"""A keyslot's area: the volume key, split over 4000 stripes and encrypted under a derived key.

Source: LUKS1 On-Disk Format Specification 1.2.3, §2.4 (anti-forensic splitter); LUKS2 On-Disk
Format Specification 1.1.1, §3.2: 512-byte sectors, numbered from the start of the area.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from tdxd.core.luks2_layout import KEY_BYTES, STRIPES

if TYPE_CHECKING:  # the daemon answers before it loads cryptography
    from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, modes

__all__ = ["NOISE_BYTES", "SPLIT_BYTES", "merge", "open_area", "seal_area", "split"]

SPLIT_BYTES = STRIPES * KEY_BYTES
"""What of the area is used: 500 sectors."""
NOISE_BYTES = (STRIPES - 1) * KEY_BYTES
_SECTOR_BYTES = 512
_HALF_BYTES = 32
"""The splitter diffuses in pieces of the hash's size."""


def seal_area(key: bytes, noise: bytes, area_key: bytes) -> bytes:
    """Split a 64-byte key with `NOISE_BYTES` of noise, and encrypt that: `SPLIT_BYTES`."""
    return _crypt(split(key, noise), area_key, lambda cipher: cipher.encryptor())


def open_area(area: bytes, area_key: bytes) -> bytes:
    """Return the 64 bytes that an area holds if `area_key` is right, and noise if not."""
    plain = _crypt(area[:SPLIT_BYTES], area_key, lambda cipher: cipher.decryptor())
    return merge(plain)


def split(key: bytes, noise: bytes) -> bytes:
    """Spread the key over 4000 stripes of which every byte is needed to get it back."""
    return noise + _xor(_diffused(noise), int.from_bytes(key, "big"))


def merge(stripes: bytes) -> bytes:
    """Undo `split`."""
    last = int.from_bytes(stripes[NOISE_BYTES:], "big")
    return _xor(_diffused(memoryview(stripes)[:NOISE_BYTES]), last)


def _diffused(noise: bytes | memoryview) -> bytes:
    """Hash each stripe, XORed with what came of the ones before it."""
    sha256 = hashlib.sha256
    state = bytes(KEY_BYTES)
    for start in range(0, NOISE_BYTES, KEY_BYTES):
        stripe = int.from_bytes(noise[start : start + KEY_BYTES], "big")
        mixed = _xor(state, stripe)
        low = sha256(b"\0\0\0\0" + mixed[:_HALF_BYTES]).digest()
        state = low + sha256(b"\0\0\0\1" + mixed[_HALF_BYTES:]).digest()
    return state


def _xor(left: bytes, right: int) -> bytes:
    return (int.from_bytes(left, "big") ^ right).to_bytes(KEY_BYTES, "big")


def _crypt(
    data: bytes,
    area_key: bytes,
    context: Callable[[Cipher[modes.XTS]], CipherContext],
) -> bytes:
    """Encrypt or decrypt each 512-byte sector under its number."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    # Setting the mode of one Cipher, instead of making one per sector, saves a third.
    cipher = Cipher(algorithms.AES(area_key), modes.XTS(bytes(16)))
    sectors = []
    for number, start in enumerate(range(0, len(data), _SECTOR_BYTES)):
        cipher.mode = modes.XTS(number.to_bytes(16, "little"))
        sectors.append(context(cipher).update(data[start : start + _SECTOR_BYTES]))
    return b"".join(sectors)
