"""Runs of sealed blocks: encrypt, decrypt, verify; and the public record beside an image.

A run is some consecutive 4096-byte blocks of the payload. Block n is one AES-256-XTS unit
whose tweak is its number in 512-byte sectors, 8·n, as 16 bytes little-endian: dm-crypt's
`aes-xts-plain64` with `sector_size:4096` and no `iv_large_sectors`.

Source: Linux, Documentation/admin-guide/device-mapper/dm-crypt.rst; IEEE 1619-2018.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from tdxd.core.bundle import BLOCK_BYTES
from tdxd.core.decode import decode
from tdxd.core.verity import DIGEST_BYTES, run_digests
from tdxd.core.volume_id import check_volume_id
from tdxd.errors import DataError

if TYPE_CHECKING:  # the daemon answers before it loads cryptography
    from cryptography.hazmat.primitives.ciphers import Cipher, modes

__all__ = [
    "RUN_SLACK_BYTES",
    "PublicRecord",
    "decrypt_run",
    "encrypt_run",
    "first_bad_block",
    "open_run",
]

_SECTORS_PER_BLOCK = BLOCK_BYTES // 512
RUN_SLACK_BYTES = 15
"""How much longer than the run an output buffer must be: `update_into` asks for a cipher block
less one of room, though XTS never writes there."""
_RECORD_MAX_BYTES = 4096
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")


def encrypt_run(key: bytes, first_block: int, run: memoryview, out: memoryview) -> None:
    """Encrypt a run of whole blocks into `out` (run + RUN_SLACK_BYTES) under a 64-byte key."""
    cipher, tweak = _cipher(key)
    for index, start in enumerate(range(0, len(run), BLOCK_BYTES)):
        cipher.mode = tweak(first_block + index)
        stop = start + BLOCK_BYTES
        cipher.encryptor().update_into(
            run[start:stop], out[start : stop + RUN_SLACK_BYTES]
        )


def decrypt_run(key: bytes, first_block: int, run: memoryview, out: memoryview) -> None:
    """Decrypt a run of whole blocks into `out` (run + RUN_SLACK_BYTES) under a 64-byte key."""
    cipher, tweak = _cipher(key)
    for index, start in enumerate(range(0, len(run), BLOCK_BYTES)):
        cipher.mode = tweak(first_block + index)
        stop = start + BLOCK_BYTES
        cipher.decryptor().update_into(
            run[start:stop], out[start : stop + RUN_SLACK_BYTES]
        )


def first_bad_block(salt: bytes, run: memoryview, digests: memoryview) -> int:
    """Compare a run of plain blocks with 32 bytes of digest each.

    Returns the index of the first block that differs, or -1.
    """
    found = run_digests(salt, run)
    if found == digests[: len(found)]:
        return -1
    blocks = range(len(run) // BLOCK_BYTES)
    spans = (
        slice(index * DIGEST_BYTES, (index + 1) * DIGEST_BYTES) for index in blocks
    )
    return next(index for index, at in enumerate(spans) if found[at] != digests[at])


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


def _cipher(key: bytes) -> tuple[Cipher[modes.XTS], Callable[[int], modes.XTS]]:
    """Return a cipher and the mode of block n.

    Setting the mode of one Cipher, instead of making a Cipher per block, saves a third.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    def tweak(block: int) -> modes.XTS:
        return modes.XTS((block * _SECTORS_PER_BLOCK).to_bytes(16, "little"))

    return Cipher(algorithms.AES(key), modes.XTS(bytes(16))), tweak


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PublicRecord:
    """What `NAME.img.json` says of an image, so that anyone can check a copy.

    `sha256` is that of the whole file, in hex; `created` is UTC, as RFC 3339. The guest never
    relies on any of it.
    """

    format: Literal[1] = 1
    id: str
    generation: int
    size_bytes: int
    sha256: str
    created: str

    def __post_init__(self) -> None:
        check_volume_id(self.id)
        if self.generation < 1 or self.size_bytes < 1:
            msg = "generation and size_bytes must be at least 1"
            raise ValueError(msg)
        if not _HEX_DIGEST.fullmatch(self.sha256):
            msg = f"sha256 {self.sha256!r} is not 64 lower-case hex digits"
            raise ValueError(msg)

    def encode(self) -> bytes:
        """Encode as indented JSON with a final newline."""
        return (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes, *, source: str) -> PublicRecord:
        """Decode JSON; unknown, missing and duplicate keys are refused.

        Raises: DataError.
        """
        if len(data) > _RECORD_MAX_BYTES:
            text = f"{source}: {len(data)} bytes, at most {_RECORD_MAX_BYTES} allowed"
            raise DataError(text)
        try:
            value = json.loads(data.decode(), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as exc:
            hint = "this file is written by tdx-seal create"
            raise DataError(f"{source}: not valid JSON", hint=hint) from exc
        return decode(cls, value, source=source, error=DataError)


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        msg = "duplicate key"
        raise ValueError(msg)
    return made
