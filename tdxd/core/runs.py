"""Runs of blocks: encrypt, decrypt, hash, verify.

A run is some consecutive 4096-byte blocks of the payload. Block n is one AES-256-XTS unit
whose tweak is its number in 512-byte sectors, 8·n, as 16 bytes little-endian: dm-crypt's
`aes-xts-plain64` with `sector_size:4096` and no `iv_large_sectors`.

Worker processes begin with this module, so it imports next to nothing: `dataclasses`, `typing`
and `json` alone would take them longer than 30 MiB of work.

Source: Linux, Documentation/admin-guide/device-mapper/dm-crypt.rst and verity.rst; IEEE 1619-2018.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:  # the daemon answers before it loads cryptography
    from cryptography.hazmat.primitives.ciphers import Cipher, modes

__all__ = [
    "BLOCK_BYTES",
    "DIGESTS_PER_BLOCK",
    "DIGEST_BYTES",
    "RUN_SLACK_BYTES",
    "decrypt_run",
    "encrypt_run",
    "first_bad_block",
    "first_bad_digest",
    "open_run",
    "padded",
    "run_digests",
]

BLOCK_BYTES = 4096
"""Size of an encryption sector, of a dm-verity block and of a file system block."""
DIGEST_BYTES = 32
DIGESTS_PER_BLOCK = BLOCK_BYTES // DIGEST_BYTES
RUN_SLACK_BYTES = 15
"""How much longer than the run an output buffer must be: `update_into` asks for a cipher block
less one of room, though XTS never writes there."""
_SECTORS_PER_BLOCK = BLOCK_BYTES // 512


def encrypt_run(
    key: bytes,
    first_block: int,
    run: memoryview,
    out: memoryview,
    *,
    sector_bytes: int = BLOCK_BYTES,
) -> None:
    """Encrypt a run of whole sectors into `out` (run + RUN_SLACK_BYTES) under a 64-byte key.

    The run begins at block `first_block`, whatever the size of its sectors.
    """
    cipher, tweak = _cipher(key)
    for start in range(0, len(run), sector_bytes):
        cipher.mode = tweak(first_block * _SECTORS_PER_BLOCK + start // 512)
        stop = start + sector_bytes
        cipher.encryptor().update_into(
            run[start:stop], out[start : stop + RUN_SLACK_BYTES]
        )


def decrypt_run(
    key: bytes,
    first_block: int,
    run: memoryview,
    out: memoryview,
    *,
    sector_bytes: int = BLOCK_BYTES,
) -> None:
    """Decrypt a run of whole sectors, as `encrypt_run` encrypts them."""
    cipher, tweak = _cipher(key)
    for start in range(0, len(run), sector_bytes):
        cipher.mode = tweak(first_block * _SECTORS_PER_BLOCK + start // 512)
        stop = start + sector_bytes
        cipher.decryptor().update_into(
            run[start:stop], out[start : stop + RUN_SLACK_BYTES]
        )


def first_bad_block(salt: bytes, run: memoryview, digests: memoryview) -> int:
    """Compare a run of plain blocks with 32 bytes of digest each.

    Returns the index of the first block that differs, or -1.
    """
    return first_bad_digest(run_digests(salt, run), digests)


def first_bad_digest(found: bytes, wanted: memoryview) -> int:
    """Compare digests of 32 bytes; `wanted` may be longer.

    Returns the index of the first that differs, or -1.
    """
    if found == wanted[: len(found)]:
        return -1
    spans = (
        slice(start, start + DIGEST_BYTES)
        for start in range(0, len(found), DIGEST_BYTES)
    )
    return next(index for index, at in enumerate(spans) if found[at] != wanted[at])


def open_run(
    key: bytes,
    salt: bytes,
    *,
    first_block: int,
    run: memoryview,
    digests: memoryview,
    out: memoryview,
) -> int:
    """Decrypt a run into `out` and verify it there.

    Returns the index of the first block that does not match its digest, or -1. What stands in
    `out` may be used only after -1.
    """
    decrypt_run(key, first_block, run, out)
    return first_bad_block(salt, out[: len(run)], digests)


def run_digests(salt: bytes, blocks: memoryview) -> bytes:
    """Hash a run of whole blocks: 32 bytes for each 4096 of the input, in order."""
    salted = hashlib.sha256(salt).copy
    digests = []
    for start in range(0, len(blocks), BLOCK_BYTES):
        state = salted()
        state.update(blocks[start : start + BLOCK_BYTES])
        digests.append(state.digest())
    return b"".join(digests)


def padded(digests: bytes) -> bytes:
    """Fill digests up with zeros to whole 4096-byte hash blocks."""
    return digests + bytes(-len(digests) % BLOCK_BYTES)


def _cipher(key: bytes) -> tuple[Cipher[modes.XTS], Callable[[int], modes.XTS]]:
    """Return a cipher and the mode of the unit that begins at 512-byte sector n.

    Setting the mode of one Cipher, instead of making a Cipher per block, saves a third.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    def tweak(sector: int) -> modes.XTS:
        return modes.XTS(sector.to_bytes(16, "little"))

    return Cipher(algorithms.AES(key), modes.XTS(bytes(16))), tweak
