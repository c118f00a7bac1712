"""The vectors of foreign volumes, opened twice: by a plain reader, and by the product."""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import json
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from tdxd.core.luks2_unlock import unlock
from tdxd.core.secret import Secret
from tdxd.owner.foreign.image import pin_header, read_foreign

VECTORS = Path(__file__).parents[1] / "vectors/luks2"
NAMES = ("argon2id", "pbkdf2")


def expected(name: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((VECTORS / f"{name}.expected.json").read_bytes())
    return made


@functools.cache
def image_of(name: str) -> bytes:
    return gzip.decompress((VECTORS / f"{name}.img.gz").read_bytes())


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


# --- a plain reader: nothing of tdxd ----------------------------------------------------


def xts(key: bytes, data: bytes, unit_bytes: int) -> bytes:
    """Decrypt units whose tweak is the number of their first 512 bytes."""
    plain = b""
    for start in range(0, len(data), unit_bytes):
        tweak = struct.pack("<QQ", start // 512, 0)
        cipher = Cipher(algorithms.AES(key), modes.XTS(tweak)).decryptor()
        plain += cipher.update(data[start : start + unit_bytes])
    return plain


def merged(stripes: bytes) -> bytes:
    """Undo the anti-forensic splitter: 4000 stripes of 64 bytes, diffused by SHA-256."""
    state = bytes(64)
    for start in range(0, 3999 * 64, 64):
        state = bytes(
            a ^ b for a, b in zip(state, stripes[start : start + 64], strict=True)
        )
        state = b"".join(
            hashlib.sha256(struct.pack(">I", part) + state[32 * part :][:32]).digest()
            for part in (0, 1)
        )
    last = stripes[3999 * 64 : 4000 * 64]
    return bytes(a ^ b for a, b in zip(state, last, strict=True))


def derived(kdf: dict[str, Any], passphrase: bytes) -> bytes:
    salt = base64.b64decode(kdf["salt"])
    if kdf["type"] == "pbkdf2":
        return hashlib.pbkdf2_hmac("sha256", passphrase, salt, kdf["iterations"], 64)
    return Argon2id(
        salt=salt,
        length=64,
        iterations=kdf["time"],
        lanes=kdf["cpus"],
        memory_cost=kdf["memory"],
    ).derive(passphrase)


def test_plain_reader(name):
    data, want = image_of(name), expected(name)
    assert hashlib.sha256(data).hexdigest() == want["image_sha256"]
    copies = []
    for start, magic in ((0, b"LUKS\xba\xbe"), (16384, b"SKUL\xba\xbe")):
        copy = bytearray(data[start : start + 16384])
        assert copy[:8] == magic + struct.pack(">H", 2)
        assert struct.unpack_from(">Q", copy, 8) == (16384,)
        assert struct.unpack_from(">Q", copy, 256) == (start,)
        checksum, copy[448:512] = bytes(copy[448:512]), bytes(64)
        assert checksum == hashlib.sha256(copy).digest() + bytes(32)
        assert copy[168:204].decode() == want["uuid"]
        copies.append(bytes(copy[4096:]))
    assert copies[0] == copies[1]
    document = json.loads(copies[0].rstrip(b"\0"))
    slot, segment = document["keyslots"]["0"], document["segments"]["0"]
    offset, digest = int(segment["offset"]), document["digests"]["0"]
    area = int(slot["area"]["offset"])
    area_key = derived(slot["kdf"], want["passphrase"].encode())
    key = merged(xts(area_key, data[area : area + 4000 * 64], 512))
    salt = base64.b64decode(digest["salt"])
    found = hashlib.pbkdf2_hmac("sha256", key, salt, digest["iterations"], 32)
    assert found == base64.b64decode(digest["digest"])
    assert key.hex() == want["volume_key"]
    assert offset == want["payload_offset_bytes"]
    assert segment["sector_size"] == want["sector_bytes"]
    assert hashlib.sha256(data[:offset]).hexdigest() == want["header_sha256"]
    payload = xts(key, data[offset:], want["sector_bytes"])
    assert hashlib.sha256(payload).hexdigest() == want["payload_sha256"]
    assert payload[1080:1082] == b"\x53\xef"  # ext4's magic number
    assert b"what the owner put there\n" in payload


# --- others -----------------------------------------------------------------------------


def test_product(name, tmp_path):
    want, path = expected(name), tmp_path / "vector.img"
    path.write_bytes(image_of(name))
    found = read_foreign(path)
    with Secret(want["passphrase"].encode()) as passphrase:
        key = unlock(found.header, found.region, passphrase, source="vector")
        assert pin_header(path, passphrase).hex() == want["header_sha256"]
    assert key.reveal().hex() == want["volume_key"]
    header = found.header
    assert header.uuid == want["uuid"]
    assert header.sector_bytes == want["sector_bytes"]
    assert header.payload_offset_bytes == want["payload_offset_bytes"]
    assert found.image_bytes == want["image_bytes"]


def test_cryptsetup_takes_it(name, tmp_path):
    (tmp_path / "vector.img").write_bytes(image_of(name))
    subprocess.run(
        [
            "cryptsetup",
            "open",
            "--test-passphrase",
            "--disable-locks",
            "--key-file",
            "-",
            tmp_path / "vector.img",
        ],
        input=expected(name)["passphrase"].encode(),
        check=True,
        timeout=60,
    )
