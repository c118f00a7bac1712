"""What a host needs to forge a LUKS2 header: take one apart, change it, mend its checksums."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import json
import struct
from typing import Any

from tdxd.core import luks2_area
from tdxd.core.luks2_layout import CHECKSUM_OFFSET
from tests.luks2_genuine import encrypt, ext4

__all__ = [
    "HOST_KEY",
    "HOST_PLAINTEXT",
    "Luks2File",
    "compact",
    "digest_of",
    "host_file_system",
]

HOST_PLAINTEXT = b"what the host wants the guest to read "
HOST_KEY = hashlib.shake_256(b"a volume key that the host chose").digest(64)


@dataclasses.dataclass(slots=True)
class Luks2File:
    """An image in memory, with what it takes to forge its header."""

    data: bytearray

    @property
    def document(self) -> dict[str, Any]:
        """The JSON of the first copy."""
        parsed: dict[str, Any] = json.loads(self.text)
        return parsed

    @property
    def text(self) -> bytes:
        """The JSON of the first copy, as it is written."""
        return bytes(self.data[4096:16384]).rstrip(b"\0")

    @property
    def payload_offset(self) -> int:
        """Where the payload begins in the genuine image."""
        return int(self.document["segments"]["0"]["offset"])

    @property
    def sector_bytes(self) -> int:
        """Of the genuine payload."""
        return int(self.document["segments"]["0"]["sector_size"])

    def put_text(self, text: bytes, *, copies: tuple[int, ...] = (0, 1)) -> None:
        """Write a JSON area with the right checksum."""
        assert len(text) <= 12288
        for copy in copies:
            start = copy * 16384 + 4096
            self.data[start : start + 12288] = text.ljust(12288, b"\0")
            self.seal(copy * 16384, 16384)

    def put(
        self, document: dict[str, Any], *, copies: tuple[int, ...] = (0, 1)
    ) -> None:
        """Write a document as cryptsetup would."""
        self.put_text(compact(document), copies=copies)

    def seal(self, start: int, size: int) -> None:
        """Mend the checksum of the copy of `size` bytes at `start`."""
        at = start + CHECKSUM_OFFSET
        self.data[at : at + 64] = bytes(64)
        digest = hashlib.sha256(self.data[start : start + size]).digest()
        self.data[at : at + 32] = digest

    def set_sequence(self, copy: int, sequence: int) -> None:
        """Change one copy's sequence number."""
        struct.pack_into(">Q", self.data, copy * 16384 + 16, sequence)
        self.seal(copy * 16384, 16384)

    def spoil(self, copy: int) -> None:
        """Give one copy a wrong checksum."""
        self.data[copy * 16384 + CHECKSUM_OFFSET] ^= 1

    def put_host_payload(self, *, key: bytes | None = None) -> None:
        """Put the host's file system where the payload is, in the clear or under its key."""
        start = self.payload_offset
        plain = host_file_system()
        made = encrypt(key, plain, self.sector_bytes) if key else plain
        self.data[start:] = made

    def put_host_key(self, document: dict[str, Any], keyslot: str, digest: str) -> None:
        """Put the host's key, split but not encrypted, into a keyslot, and its digest."""
        area = document["keyslots"][keyslot]["area"]
        split = luks2_area.split(HOST_KEY, bytes(luks2_area.NOISE_BYTES))
        self.data[int(area["offset"]) : int(area["offset"]) + len(split)] = split
        document["digests"][digest] |= digest_of(HOST_KEY)


def compact(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def digest_of(key: bytes) -> dict[str, object]:
    salt = hashlib.sha256(b"salt").digest()
    value = hashlib.pbkdf2_hmac("sha256", key, salt, 1000, 32)
    return {
        "iterations": 1000,
        "salt": base64.b64encode(salt).decode(),
        "digest": base64.b64encode(value).decode(),
    }


@functools.cache
def host_file_system() -> bytes:
    """An ext4 that the host would like to see mounted."""
    return ext4(HOST_PLAINTEXT, label="host")
