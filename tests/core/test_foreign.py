"""Manifests and bundles of foreign volumes, and telling them from those of sealed images."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core.bundle import KeyBundle, Manifest
from tdxd.core.decode import encode_canonical
from tdxd.core.foreign import (
    ForeignManifest,
    PassphraseBundle,
    parse_any_bundle,
    parse_any_manifest,
)
from tdxd.core.secret import Secret
from tdxd.errors import BadBundleError, DataError
from tests.fakes import make_bundle

VECTORS = Path(__file__).parents[1] / "vectors/sealed"
FOREIGN = ForeignManifest(volume_id="resnet", generation=3, header_sha256=bytes(32))


def bundle(passphrase: bytes = b"open sesame") -> PassphraseBundle:
    return PassphraseBundle(manifest=FOREIGN, secret=Secret(passphrase))


def test_a_manifest_is_this_very_msgpack():
    made = ForeignManifest(volume_id="m", generation=1).encode()
    assert made == (
        b"\x86\xa6format\x01\xa2fs\xa4ext4\xaageneration\x01\xadheader_sha256\xc4\x00"
        b"\xa4kind\xa5luks2\xa9volume_id\xa1m"
    )
    digest = ForeignManifest(volume_id="m", generation=1).digest()
    assert digest == hashlib.sha256(made).digest()


@pytest.mark.parametrize("parse", [ForeignManifest.parse, parse_any_manifest])
def test_a_manifest_survives_a_round_trip(parse):
    assert parse(FOREIGN.encode()) == FOREIGN


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"volume_id": "../x"}, "volume id '../x'"),
        ({"generation": 0}, "generation 0 is not between 1 and"),
        ({"generation": 2**63}, "is not between"),
        ({"header_sha256": b"x"}, "header_sha256 has 1 bytes, not 32 or none"),
        ({"kind": "luks1"}, "kind: expected one of 'luks2', got 'luks1'"),
        ({"kind": None}, "kind: expected one of"),
        ({"format": 2}, "format: expected one of 1, got 2"),
        ({"fs": "erofs"}, "fs: expected one of 'ext4'"),
        ({"salt": bytes(32)}, "salt: unknown key"),
    ],
)
@pytest.mark.parametrize("parse", [ForeignManifest.parse, parse_any_manifest])
def test_a_wrong_manifest_is_refused(parse, changes, text):
    data = encode_canonical(dataclasses.asdict(FOREIGN) | changes)
    with pytest.raises(DataError, match=text):
        parse(data, source="x")


@pytest.mark.parametrize("key", ["format", "fs"])
@pytest.mark.parametrize("made", [FOREIGN, make_bundle().manifest])
def test_a_manifest_that_leaves_out_what_has_a_default_is_refused(made, key):
    """It would have two encodings, and the digest would be of the other one."""
    fields = dataclasses.asdict(made)
    del fields[key]
    with pytest.raises(DataError, match="x: a key is missing"):
        parse_any_manifest(encode_canonical(fields), source="x")


def test_a_manifest_out_of_order_is_refused():
    data = encode_canonical({"volume_id": "m", "generation": 1})
    swapped = b"\x82" + data[1 + 12 :] + data[1 : 1 + 12]
    with pytest.raises(DataError, match="not in canonical form"):
        ForeignManifest.parse(swapped)


def test_a_sealed_manifest_is_told_from_a_foreign_one():
    sealed = make_bundle().manifest
    assert parse_any_manifest(sealed.encode()) == sealed
    with pytest.raises(DataError, match="unknown key"):
        ForeignManifest.parse(sealed.encode())
    with pytest.raises(DataError, match="unknown key"):
        Manifest.parse(FOREIGN.encode())


@pytest.mark.parametrize("parse", [PassphraseBundle.parse, parse_any_bundle])
@pytest.mark.parametrize("passphrase", [b"x", b" with spaces\n", bytes(512)])
def test_a_passphrase_comes_back_as_typed(parse, passphrase):
    back = parse(bundle(passphrase).encode())
    assert isinstance(back, PassphraseBundle)
    assert back.manifest == FOREIGN
    assert back.secret.reveal() == passphrase


@pytest.mark.parametrize("size", [0, 513])
def test_a_passphrase_of_another_length_is_refused(size):
    with pytest.raises(ValueError, match=f"has {size} bytes, not 1 to 512"):
        bundle(b"x" * size)
    data = encode_canonical({"manifest": FOREIGN.encode(), "secret": b"x" * size})
    with pytest.raises(BadBundleError, match=f"v: the passphrase has {size} bytes"):
        parse_any_bundle(data, source="v", error=BadBundleError)


def test_a_sealed_bundle_is_told_from_a_foreign_one():
    sealed = make_bundle()
    back = parse_any_bundle(sealed.encode())
    assert isinstance(back, KeyBundle)
    assert back.manifest == sealed.manifest
    assert back.secret.reveal() == sealed.secret.reveal()
    with pytest.raises(DataError, match="unknown key"):
        KeyBundle.parse(bundle().encode())
    with pytest.raises(DataError, match="unknown key"):
        PassphraseBundle.parse(sealed.encode())


def test_a_sealed_manifest_with_a_passphrase_is_refused():
    data = encode_canonical(
        {"manifest": make_bundle().manifest.encode(), "secret": b"short"}
    )
    with pytest.raises(DataError, match="the secret has 5 bytes, not 64"):
        parse_any_bundle(data)


def test_no_message_and_no_repr_shows_the_passphrase():
    made = bundle(b"open sesame")
    assert "sesame" not in repr(made)
    damaged = made.encode().replace(b"resnet", b"RESNET")
    with pytest.raises(DataError) as caught:
        parse_any_bundle(damaged)
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"manifest": FOREIGN.encode(), "secret": "open sesame"},
        {"manifest": "open sesame", "secret": b"x"},
        {"manifest": FOREIGN.encode(), "secret": b"x", "open sesame": 1},
        "open sesame",
    ],
)
def test_no_message_shows_what_may_be_a_misplaced_passphrase(fields):
    with pytest.raises(DataError, match="not a map of manifest and secret") as caught:
        parse_any_bundle(encode_canonical(fields))
    assert "sesame" not in f"{caught.value!r} {caught.value.__cause__!r}"


def test_the_encoding_of_sealed_bundles_has_not_changed():
    """The vectors of the format are older than the second kind."""
    files = sorted(VECTORS.glob("*.bundle"))
    assert files
    for file in files:
        data = file.read_bytes()
        assert parse_any_bundle(data).encode() == data


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_not_crashed_on(data):
    for parse in (parse_any_bundle, parse_any_manifest):
        with pytest.raises(DataError):
            parse(data, source="x")
