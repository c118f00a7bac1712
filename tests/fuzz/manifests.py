"""Forged manifests and bundles: a genuine one whose fields the fuzzer replaces, adds and drops.

Bytes alone seldom are canonical msgpack, so that a parser of it refuses them at the door.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from tdxd.core.bundle import KeyBundle, Manifest, volume_key
from tdxd.core.decode import encode_canonical
from tdxd.core.foreign import (
    ForeignManifest,
    PassphraseBundle,
    parse_any_bundle,
    parse_any_manifest,
)
from tdxd.core.secret import Secret
from tdxd.errors import BadBundleError, DataError

__all__ = ["SEEDS", "read_forged"]

_SEALED = Manifest(
    volume_id="digits",
    generation=1,
    payload_offset_bytes=16 << 20,
    data_blocks=10,
    hash_blocks=1,
    root_hash=bytes(32),
    salt=bytes(32),
)
_FOREIGN = ForeignManifest(volume_id="digits", generation=1, header_sha256=bytes(32))
_CANARY = b"open sesame 0123456789 open sesame 0123456789 open sesame 012345"
_KEY = volume_key(KeyBundle(manifest=_SEALED, secret=Secret(_CANARY))).reveal()
_NAMES = (
    *(field.name for field in dataclasses.fields(_SEALED)),
    *("kind", "header_sha256", "", "x"),
)

SEEDS = (
    b"\x00",
    b"\x01",
    b"\x00\x02\x00\x00",
    b"\x00\x03\x00\x08" + (2**40).to_bytes(8, "big"),
    b"\x01\x02\x01\x03abc",
    b"\x00\x06\x02\x20" + bytes(32),
    b"\x00\x09\x01\x05luks2",
    b"\x01\x0a\x02\x20" + bytes(32) + b"\x08\x03",
    b"\x02\x02\x01\x0bopen sesame",
)
"""A kind of manifest, then changes: a field, what becomes of it, and its new value."""


def _values(data: bytes) -> Iterator[tuple[str, object]]:
    """Yield the changes that some bytes stand for; the value of one to be dropped is `_Drop`."""
    place = 0
    while place + 1 < len(data):
        name = _NAMES[data[place] % len(_NAMES)]
        kind, place = data[place + 1] % 6, place + 2
        size = data[place] if place < len(data) else 0
        body = data[place + 1 : place + 1 + size]
        if kind < 3:
            place += 1 + len(body)
        match kind:
            case 0:
                yield name, int.from_bytes(body[:8], "big")
            case 1:
                yield name, body.decode(errors="replace")
            case 2:
                yield name, body
            case 3:
                yield name, _Drop
            case 4:
                yield name, None
            case _:
                yield name, [{"": True}, -1.5]


class _Drop:
    """Marks a field that is left out."""


def read_forged(data: bytes) -> None:
    """Read what the bytes stand for, as a manifest and inside a bundle."""
    genuine: Manifest | ForeignManifest = _FOREIGN if data[:1] == b"\x01" else _SEALED
    fields = {
        field.name: getattr(genuine, field.name)
        for field in dataclasses.fields(genuine)
    }
    for name, value in _values(data[1:]):
        if value is _Drop:
            fields.pop(name, None)
        else:
            fields[name] = value
    forged = encode_canonical(fields)
    _read_manifest(forged)
    secret: object = _CANARY if data[:1] != b"\x02" else _CANARY.decode()
    _read_bundle(encode_canonical({"manifest": forged, "secret": secret}))


def _read_manifest(forged: bytes) -> None:
    accepted = 0
    for cls in (Manifest, ForeignManifest):
        with contextlib.suppress(DataError):
            assert cls.parse(forged).encode() == forged
            accepted += 1
    assert accepted < 2
    try:
        read = parse_any_manifest(forged)
    except DataError:
        assert not accepted
    else:
        assert accepted == 1
        assert read.encode() == forged


def _read_bundle(data: bytes) -> None:
    """A changed manifest gives another key; no error shows the secret, nor does a `repr`."""
    shown = ""
    try:
        read = parse_any_bundle(data, error=BadBundleError)
    except BadBundleError as exc:
        shown = f"{exc!r} {exc.hint} {exc.__cause__!r}"
    assert "open sesame" not in shown
    if shown:
        return
    assert "open sesame" not in repr(read)
    assert read.encode() == data
    if isinstance(read, PassphraseBundle):
        return
    same = read.manifest == _SEALED
    assert (volume_key(read).reveal() == _KEY) == same
