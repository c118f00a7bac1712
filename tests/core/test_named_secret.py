"""Manifests and bundles of named secrets, and telling them from those of volumes."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core.bundle import KeyBundle
from tdxd.core.decode import encode_canonical
from tdxd.core.foreign import (
    PassphraseBundle,
    parse_any_bundle,
    parse_any_manifest,
)
from tdxd.core.keyrelease import encode_released, parse_released
from tdxd.core.named_secret import (
    SECRET_CONTENT_MAX_BYTES,
    NamedSecret,
    SecretManifest,
    parse_released_bundle,
    parse_released_manifest,
)
from tdxd.core.secret import Secret
from tdxd.errors import BadBundleError, DataError
from tests.fakes import make_bundle, make_passphrase_bundle

MANIFEST = SecretManifest(volume_id="front-tls", generation=3, content="file")
IDS = st.from_regex(r"[a-z0-9_-]{1,64}", fullmatch=True)
KINDS = st.sampled_from(["tls-pem", "client-ca", "file"])


def secret(content: bytes = b"open sesame") -> NamedSecret:
    return NamedSecret(manifest=MANIFEST, secret=Secret(content))


def test_a_manifest_is_this_very_msgpack():
    assert MANIFEST.encode() == (
        b"\x85\xa7content\xa4file\xa6format\x01\xaageneration\x03"
        b"\xa4kind\xa6secret\xa9volume_id\xa9front-tls"
    )


@given(
    IDS, st.integers(1, 2**63 - 1), KINDS, st.binary(min_size=1), st.integers(1, 4096)
)
def test_any_secret_survives_a_round_trip(name, number, kind, piece, times):
    content = (piece * times)[:SECRET_CONTENT_MAX_BYTES]
    manifest = SecretManifest(volume_id=name, generation=number, content=kind)
    made = NamedSecret(manifest=manifest, secret=Secret(content))
    for parse in (NamedSecret.parse, parse_released_bundle):
        back = parse(made.encode())
        assert isinstance(back, NamedSecret)
        assert back.manifest == manifest
        assert back.secret.reveal() == content
        assert back.encode() == made.encode()


@given(st.data())
def test_a_changed_byte_is_refused_or_another_secret(data):
    """Whatever comes back says exactly what stands there: it encodes to the same bytes."""
    made = bytearray(secret().encode())
    where = data.draw(st.integers(0, len(made) - 1))
    made[where] ^= data.draw(st.integers(1, 255))
    try:
        back = parse_released_bundle(bytes(made), error=BadBundleError)
    except BadBundleError as exc:
        assert "sesame" not in exc.message  # noqa: PT017 — it need not be raised
    else:
        assert back.encode() == bytes(made)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_not_crashed_on(data):
    for parse in (parse_released_bundle, parse_released_manifest, NamedSecret.parse):
        with pytest.raises(DataError):
            parse(data, source="x")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"volume_id": "../x"}, "volume id '../x'"),
        ({"generation": 0}, "generation 0 is not between 1 and"),
        ({"generation": True}, "generation"),
        ({"kind": "luks2"}, "x: "),
        ({"kind": None}, "x: "),
        ({"format": 2}, "format: expected one of 1, got 2"),
        ({"content": "pem"}, "content: expected one of"),
        ({"fs": "ext4"}, "fs: unknown key"),
    ],
)
def test_a_wrong_manifest_is_refused(changes, text):
    data = encode_canonical(dataclasses.asdict(MANIFEST) | changes)
    with pytest.raises(DataError, match=text):
        parse_released_manifest(data, source="x")


@pytest.mark.parametrize("key", ["format", "content", "generation"])
def test_a_manifest_that_leaves_something_out_is_refused(key):
    fields = dataclasses.asdict(MANIFEST)
    del fields[key]
    with pytest.raises(DataError, match="x: "):
        parse_released_manifest(encode_canonical(fields), source="x")


@pytest.mark.parametrize("size", [0, SECRET_CONTENT_MAX_BYTES + 1])
def test_a_content_of_another_size_is_refused(size):
    with pytest.raises(ValueError, match=f"has {size} bytes, not 1 to 65536"):
        secret(bytes(size))
    data = encode_canonical({"manifest": MANIFEST.encode(), "secret": bytes(size)})
    with pytest.raises(BadBundleError, match=f"v: the content has {size} bytes"):
        parse_released_bundle(data, source="v", error=BadBundleError)


def test_the_largest_fits_what_is_released():
    name = "n" * 64
    manifest = SecretManifest(volume_id=name, generation=2**63 - 1, content="client-ca")
    whole = Secret(bytes(SECRET_CONTENT_MAX_BYTES))
    made = NamedSecret(manifest=manifest, secret=whole).encode()
    plain = encode_released(made, 86400)
    assert parse_released(plain, error=DataError).bundle == made
    with pytest.raises(DataError):
        parse_released_bundle(made + b"\0" * 5000)


def test_kinds_are_told_apart():
    sealed, foreign, own = make_bundle(), make_passphrase_bundle(), secret()
    for made, kind in (
        (sealed, KeyBundle),
        (foreign, PassphraseBundle),
        (own, NamedSecret),
    ):
        assert type(parse_released_bundle(made.encode())) is kind
        encoded = made.manifest.encode()
        assert parse_released_manifest(encoded) == made.manifest
    for made in (sealed, foreign):
        with pytest.raises(DataError):
            NamedSecret.parse(made.encode())
    for parse, data in (
        (parse_any_bundle, own.encode()),
        (parse_any_manifest, MANIFEST.encode()),
    ):
        with pytest.raises(DataError):
            parse(data)


def test_a_volumes_secret_is_not_as_long_as_a_named_one():
    """The larger limit is for the kind that needs it."""
    for manifest in (
        make_bundle().manifest.encode(),
        make_passphrase_bundle().manifest.encode(),
    ):
        data = encode_canonical({"manifest": manifest, "secret": bytes(60000)})
        with pytest.raises(DataError, match="has 60000 bytes"):
            parse_released_bundle(data)


def test_no_message_and_no_repr_shows_the_content():
    assert "sesame" not in repr(secret())
    damaged = secret().encode().replace(b"front-tls", b"FRONT-TLS")
    with pytest.raises(DataError) as caught:
        parse_released_bundle(damaged)
    assert "sesame" not in f"{caught.value!r} {caught.value.__cause__!r}"
