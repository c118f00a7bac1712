"""LUKS2 headers for the fuzzer: well-formed but for what an input changes, checksums mended.

Without this no random change would come past the checksum. An input is a list of edits, each of
three bytes: which place of the JSON, what is done to it, with which value. An input that begins
with `{` is the JSON area itself.
"""

from __future__ import annotations

import contextlib
import copy
import json
from typing import Any

from tdxd.core import luks2
from tdxd.core.bundle import KeyBundle, Manifest
from tdxd.core.luks2_read import REGION_MAX_BYTES, Luks2Header, read_luks2
from tdxd.core.secret import Secret
from tdxd.errors import BadHeaderError
from tests.attacks.luks2_forgery import Luks2File, compact

__all__ = ["SEEDS", "read_forged"]

_MANIFEST = Manifest(
    volume_id="fuzz",
    generation=1,
    payload_offset_bytes=luks2.PAYLOAD_OFFSET_BYTES,
    data_blocks=1,
    hash_blocks=0,
    root_hash=bytes(32),
    salt=bytes(32),
)
_BUNDLE = KeyBundle(manifest=_MANIFEST, secret=Secret(bytes(range(64))))
_COPIES = luks2.build_header(_BUNDLE, recovery=True)[:32768]
_DOCUMENT = Luks2File(bytearray(_COPIES)).document
_ARGON2ID = {"type": "argon2id", "time": 4, "memory": 1048576, "cpus": 4}
_NUMBERS = (0, 1, 4, 5, 16, 17, 32, 64, 512, 1000, 4000, 4096, 2**20, 10**7, 2**31)
_STRINGS = (
    "",
    "0",
    "1",
    "32768",
    "258048",
    "290816",
    "16744448",
    "16777216",
    "dynamic",
)
_WORDS = (
    "crypt",
    "linear",
    "raw",
    "cipher_null-ecb",
    "aes-xts-plain64",
    "sha256",
    "x\0",
)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0.5, [], ["0"], ["0", "1"], {}, {"0": {}}, [[[]]]),
    *(*_NUMBERS, *_STRINGS, *_WORDS),
    *(_DOCUMENT["keyslots"]["0"], _DOCUMENT["segments"]["0"]),
    _DOCUMENT["digests"]["0"],
    _ARGON2ID | {"salt": _DOCUMENT["keyslots"]["0"]["kdf"]["salt"]},
)
_KEYS = ("0", "1", "31", "32", "type", "flags", "priority", "integrity", "requirements")

SEEDS = (
    b"",
    b"\x05\x00\x10",
    b"\x03\x01\x20\x11\x02\x30\x07\x03\x40",
    b'{"keyslots":{}}',
    compact(_DOCUMENT),
)


def read_forged(data: bytes) -> None:
    """Read the header that an input makes; only BadHeaderError may come of it."""
    file = Luks2File(bytearray(_COPIES))
    text = data if data.startswith(b"{") else compact(_edited(data))
    if len(text) > 12288:
        return
    file.put_text(text)
    with contextlib.suppress(BadHeaderError):
        header = read_luks2(bytes(file.data), image_bytes=2**30, source="fuzz")
        assert compact(json.loads(text.rstrip(b"\0"))) == text.rstrip(b"\0")
        _check(header)


def _edited(data: bytes) -> dict[str, Any]:
    document = copy.deepcopy(_DOCUMENT)
    for start in range(0, min(len(data) - 2, 24), 3):
        place, action, value = data[start : start + 3]
        holders = _holders(document)
        holder, key = holders[place % len(holders)]
        _edit(holder, key, action, copy.deepcopy(_VALUES[value % len(_VALUES)]))
    return document


def _holders(value: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Every object with every key of it."""
    found = []
    for key, inner in value.items():
        found.append((value, key))
        if isinstance(inner, dict):
            found += _holders(inner)
    return found


def _edit(holder: dict[str, Any], key: str, action: int, value: Any) -> None:
    name = _KEYS[action // 4 % len(_KEYS)]
    if action % 4 == 0:
        holder[key] = value
    elif action % 4 == 1:
        del holder[key]
        holder["\0"] = value  # no object is left empty, so that places remain
    elif action % 4 == 2:
        holder[name] = value
    else:
        holder[name] = holder.pop(key)


def _check(header: Luks2Header) -> None:
    """What is accepted keeps every bound."""
    assert 1 <= len(header.keyslots) <= 8
    assert header.sector_bytes in (512, 4096)
    assert header.payload_offset_bytes % 4096 == 0
    assert header.payload_offset_bytes <= REGION_MAX_BYTES
    assert header.payload_offset_bytes + header.payload_bytes == 2**30
    end = 32768
    for slot in sorted(header.keyslots, key=lambda slot: slot.area_offset_bytes):
        assert slot.area_offset_bytes >= end
        end = slot.area_offset_bytes + 258048
        assert slot.kdf.memory_bytes <= 2**30
    assert end <= header.payload_offset_bytes
    assert sum(slot.kdf.cost for slot in header.keyslots) <= 2
    assert 1000 <= header.digest.iterations <= 2 * 10**6
    assert header.uuid.replace("-", "").isalnum()
