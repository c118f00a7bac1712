"""The LUKS2 header of a sealed image, as bytes that depend on the bundle alone.

The guest never reads it: it is there so that the owner's ordinary tools know the file for what
it is, and, with a recovery keyslot, can open it. Without one the header holds no keyslot at all.
All that LUKS2 wants random is derived from the bundle's secret, so the same bundle makes the
same header.

Source: LUKS2 On-Disk Format Specification 1.1.1: §2.1 binary header, §2.2 checksum, §3 JSON
area, §3.2 keyslots, §3.3 segments, §3.4 digests.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import uuid

from tdxd.core.bundle import BLOCK_BYTES, KeyBundle, derive, volume_key
from tdxd.core.luks2_area import NOISE_BYTES, seal_area
from tdxd.core.luks2_layout import (
    BINARY,
    BINARY_BYTES,
    CHECKSUM_OFFSET,
    CIPHER,
    COPY_BYTES,
    JSON_BYTES,
    KEY_BYTES,
    KEYSLOT_AREA_BYTES,
    KEYSLOT_OFFSET,
    MAGICS,
    STRIPES,
)
from tdxd.core.secret import Secret
from tdxd.errors import DataError

__all__ = [
    "HEADER_BYTES",
    "MAGIC",
    "PAYLOAD_OFFSET_BYTES",
    "Header",
    "build_header",
    "read_header",
    "recovery_passphrase",
]

PAYLOAD_OFFSET_BYTES = 16 * 2**20
"""Where `cryptsetup luksFormat` puts the payload, too."""
MAGIC = MAGICS[0]
HEADER_BYTES = KEYSLOT_OFFSET + KEYSLOT_AREA_BYTES
_ITERATIONS = 1000
"""The least that LUKS2 allows: a stronger KDF adds nothing to a random 512-bit key or a
generated 160-bit passphrase."""
_PASSPHRASE_BYTES = 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What the first copy of a header says."""

    uuid: str
    cipher: str
    sector_bytes: int
    payload_offset_bytes: int
    keyslots: int


def recovery_passphrase(bundle: KeyBundle) -> Secret:
    """Derive the passphrase of the recovery keyslot: 160 bits as 32 letters and digits."""
    with _derived(bundle, "recovery-passphrase", _PASSPHRASE_BYTES) as raw:
        text = base64.b32encode(raw.reveal()).decode().lower()
    groups = [text[start : start + 4] for start in range(0, len(text), 4)]
    return Secret("-".join(groups).encode())


def build_header(bundle: KeyBundle, *, recovery: bool) -> bytes:
    """Return the first `HEADER_BYTES` bytes of the image: both copies and the keyslot area."""
    with volume_key(bundle) as key:
        digest = _digest(bundle, key)
        area = _keyslot_area(bundle, key) if recovery else bytes(KEYSLOT_AREA_BYTES)
    keyslots = {"0": _keyslot(bundle)} if recovery else {}
    document = {
        "keyslots": keyslots,
        "tokens": {},
        "segments": {
            "0": {
                "type": "crypt",
                "offset": str(bundle.manifest.payload_offset_bytes),
                "size": "dynamic",
                "iv_tweak": "0",
                "encryption": CIPHER,
                "sector_size": BLOCK_BYTES,
            }
        },
        "digests": {"0": {**digest, "keyslots": list(keyslots), "segments": ["0"]}},
        "config": {
            "json_size": str(JSON_BYTES),
            "keyslots_size": str(PAYLOAD_OFFSET_BYTES - KEYSLOT_OFFSET),
        },
    }
    area_json = json.dumps(document, separators=(",", ":")).encode()
    area_json += bytes(JSON_BYTES - len(area_json))
    copies = [_copy(bundle, number, area_json) for number in (0, 1)]
    return copies[0] + copies[1] + area


def _copy(bundle: KeyBundle, number: int, area_json: bytes) -> bytes:
    """Return one 16 KiB copy: binary header with its checksum, then the JSON area."""
    label = f"header-salt-{number}"
    binary = bytearray(BINARY_BYTES)
    fields = (
        MAGICS[number],
        2,
        COPY_BYTES,
        1,
        b"",
        b"sha256",
        _derived(bundle, label, 64).reveal(),
        _uuid(bundle).encode(),
        b"",
        number * COPY_BYTES,
        b"",
        b"",
    )
    BINARY.pack_into(binary, 0, *fields)
    checksum = hashlib.sha256(binary + area_json).digest()
    binary[CHECKSUM_OFFSET : CHECKSUM_OFFSET + len(checksum)] = checksum
    return bytes(binary) + area_json


def _digest(bundle: KeyBundle, key: Secret) -> dict[str, object]:
    salt = _derived(bundle, "digest-salt", 32).reveal()
    value = hashlib.pbkdf2_hmac("sha256", key.reveal(), salt, _ITERATIONS, 32)
    return {
        "type": "pbkdf2",
        "hash": "sha256",
        "iterations": _ITERATIONS,
        "salt": _base64(salt),
        "digest": _base64(value),
    }


def _keyslot(bundle: KeyBundle) -> dict[str, object]:
    return {
        "type": "luks2",
        "key_size": KEY_BYTES,
        "af": {"type": "luks1", "stripes": STRIPES, "hash": "sha256"},
        "area": {
            "type": "raw",
            "offset": str(KEYSLOT_OFFSET),
            "size": str(KEYSLOT_AREA_BYTES),
            "encryption": CIPHER,
            "key_size": KEY_BYTES,
        },
        "kdf": {
            "type": "pbkdf2",
            "hash": "sha256",
            "iterations": _ITERATIONS,
            "salt": _base64(_derived(bundle, "keyslot-salt", 32).reveal()),
        },
    }


def _keyslot_area(bundle: KeyBundle, key: Secret) -> bytes:
    """Return the volume key, split and encrypted under the recovery passphrase."""
    salt = _derived(bundle, "keyslot-salt", 32).reveal()
    with recovery_passphrase(bundle) as passphrase:
        password = passphrase.reveal()
        area_key = hashlib.pbkdf2_hmac("sha256", password, salt, _ITERATIONS, KEY_BYTES)
    with _derived(bundle, "stripes", 32) as seed:
        noise = hashlib.shake_256(seed.reveal()).digest(NOISE_BYTES)
    area = seal_area(key.reveal(), noise, area_key)
    return area + bytes(KEYSLOT_AREA_BYTES - len(area))


def _uuid(bundle: KeyBundle) -> str:
    return str(uuid.UUID(bytes=_derived(bundle, "uuid", 16).reveal(), version=4))


def _derived(bundle: KeyBundle, label: str, size: int) -> Secret:
    manifest = bundle.manifest
    context = (manifest.volume_id.encode(), manifest.generation.to_bytes(8, "big"))
    return derive(bundle.secret, f"tdxd/luks2/{label}/v1", size, *context)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def read_header(data: bytes, *, source: str) -> Header:
    """Read the first copy for `inspect`; checks the checksum, trusts nothing to it.

    Raises: DataError.
    """
    if len(data) < COPY_BYTES or data[:6] != MAGIC:
        hint = "sealed images are made by tdx-seal create"
        raise DataError(f"{source}: not a LUKS2 image", hint=hint)
    fields = BINARY.unpack_from(data)
    copy = bytearray(data[:COPY_BYTES])
    copy[CHECKSUM_OFFSET : CHECKSUM_OFFSET + 64] = bytes(64)
    if fields[11] != hashlib.sha256(copy).digest().ljust(64, b"\0"):
        raise DataError(f"{source}: LUKS2 header with a wrong checksum")
    try:
        document = json.loads(bytes(data[BINARY_BYTES:COPY_BYTES]).rstrip(b"\0"))
        segment = document["segments"]["0"]
        return Header(
            uuid=fields[7].rstrip(b"\0").decode("ascii"),
            cipher=str(segment["encryption"]),
            sector_bytes=int(segment["sector_size"]),
            payload_offset_bytes=int(segment["offset"]),
            keyslots=len(document["keyslots"]),
        )
    except (ValueError, KeyError, TypeError) as exc:
        raise DataError(f"{source}: LUKS2 header of an unknown shape") from exc
