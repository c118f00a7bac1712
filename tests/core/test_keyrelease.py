"""The protocol's bytes: fixed vectors, and that every bit counts."""

from __future__ import annotations

import dataclasses
import hashlib
import struct

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core import keyrelease as protocol
from tdxd.core.decode import encode_canonical
from tdxd.core.keyrelease import Evidence, TokenClaims, VerdictFields
from tdxd.errors import BadBundleError, LocalProtocolError, RemoteProtocolError

TOKEN = bytes(range(protocol.TOKEN_BYTES))
KEY = bytes(range(1, 33))
CLAIMS = TokenClaims(nonce=b"n" * 32, expiry_s=1_800_000_060, deployment=b"d" * 16)


def fields():
    return {
        "token": TOKEN,
        "public_key": b"k" * 1216,
        "volume_ids": ("a", "resnet"),
        "signing_key_sha256": b"s" * 32,
        "event_log": b"events",
        "runtime_log": b"",
    }


def lp(data):
    return struct.pack(">I", len(data)) + data


def test_report_data_is_the_specified_hash():
    """Written out from the specification, with nothing of the product's own encoders."""
    expected = hashlib.sha512(
        lp(b"tdxd/key-release/v1")
        + lp(TOKEN)
        + lp(b"k" * 1216)
        + struct.pack(">I", 2)
        + lp(b"a")
        + lp(b"resnet")
        + lp(b"s" * 32)
        + lp(hashlib.sha384(b"events").digest())
        + lp(hashlib.sha384(b"").digest())
    ).digest()
    assert protocol.report_data(**fields()) == expected
    assert len(expected) == 64
    # The vector of docs/protocol.md, computed once by the lines above.
    assert expected.hex().startswith("9c58cd48a153dca800a94277d3d0327b")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("token", b"t" + TOKEN[1:]),
        ("public_key", b"K" * 1216),
        ("volume_ids", ("a",)),
        ("volume_ids", ("ar", "esnet")),
        ("signing_key_sha256", b"S" * 32),
        ("event_log", b""),
        ("runtime_log", b"events"),
    ],
)
def test_every_field_changes_the_report_data(name, value):
    changed = protocol.report_data(**{**fields(), name: value})
    assert changed != protocol.report_data(**fields())


def test_answer_bytes_are_the_specified_ones():
    digest = hashlib.sha384(b"request").digest()
    verdicts = (
        VerdictFields(volume_id="a", generation=3, status=1, sealed_bundle=b"xyz"),
        VerdictFields(volume_id="b", generation=0, status=2, sealed_bundle=b""),
    )
    expected = (
        lp(b"tdxd/key-release-answer/v1")
        + digest
        + lp(b"a")
        + struct.pack(">QB", 3, 1)
        + lp(b"xyz")
        + lp(b"b")
        + struct.pack(">QB", 0, 2)
        + lp(b"")
    )
    assert protocol.answer_bytes(digest, verdicts) == expected


def test_sealed_info_is_the_specified_bytes():
    digest = protocol.transcript_hash(b"request")
    assert digest == hashlib.sha384(b"request").digest()
    expected = digest + lp(b"resnet") + struct.pack(">Q", 7)
    assert protocol.sealed_info(digest, "resnet", 7) == expected


# --- signatures ---------------------------------------------------------------

SIGNER = Ed25519PrivateKey.from_private_bytes(b"\1" * 32)
OTHER = Ed25519PrivateKey.from_private_bytes(b"\2" * 32)
VERDICT = VerdictFields(volume_id="a", generation=3, status=1, sealed_bundle=b"xyz")


def raw(key):
    return key.public_key().public_bytes_raw()


def test_signature_of_any_pin_is_named():
    digest = bytes(48)
    signature = protocol.sign_answer(SIGNER, digest, [VERDICT])
    pins = (raw(OTHER), raw(SIGNER))
    assert protocol.signed_by(pins, signature, digest, [VERDICT]) == raw(SIGNER)
    assert protocol.signed_by((raw(OTHER),), signature, digest, [VERDICT]) is None
    assert protocol.signed_by((), signature, digest, [VERDICT]) is None


@pytest.mark.parametrize(
    "change",
    [{"volume_id": "b"}, {"generation": 4}, {"status": 2}, {"sealed_bundle": b"xyZ"}],
)
def test_every_verdict_field_is_signed(change):
    signature = protocol.sign_answer(SIGNER, bytes(48), [VERDICT])
    other = dataclasses.replace(VERDICT, **change)
    assert protocol.signed_by((raw(SIGNER),), signature, bytes(48), [other]) is None


def test_request_is_signed():
    signature = protocol.sign_answer(SIGNER, bytes(48), [VERDICT])
    pins = (raw(SIGNER),)
    assert protocol.signed_by(pins, signature, b"\1" + bytes(47), [VERDICT]) is None


def test_every_bit_of_a_signature_counts():
    signature = protocol.sign_answer(SIGNER, bytes(48), [VERDICT])
    for bit in range(len(signature) * 8):
        bad = bytearray(signature)
        bad[bit // 8] ^= 1 << bit % 8
        pins = (raw(SIGNER),)
        assert protocol.signed_by(pins, bytes(bad), bytes(48), [VERDICT]) is None


@given(st.binary(max_size=70))
def test_signature_of_any_length_is_no_crash(signature):
    assert protocol.signed_by((raw(SIGNER),), signature, bytes(48), [VERDICT]) is None


# --- tokens -------------------------------------------------------------------


def token():
    return protocol.encode_token(CLAIMS, key=KEY, iv=b"i" * 12)


def test_token_round_trip():
    assert protocol.decode_token(token(), keys=[bytes(32), KEY]) == CLAIMS
    assert len(token()) == protocol.TOKEN_BYTES == 92


def test_token_layout():
    assert token()[:8] == protocol.token_key_id(KEY)
    assert token()[8:20] == b"i" * 12


def test_token_of_an_unknown_key_names_it():
    with pytest.raises(RemoteProtocolError, match="unknown key") as caught:
        protocol.decode_token(token(), keys=[bytes(32)])
    assert protocol.token_key_id(KEY).hex() in caught.value.message


def test_every_bit_of_a_token_counts():
    good = token()
    for bit in range(len(good) * 8):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RemoteProtocolError):
            protocol.decode_token(bytes(bad), keys=[KEY])


@given(st.binary(max_size=2 * protocol.TOKEN_BYTES))
def test_any_other_bytes_are_no_token(data):
    with pytest.raises(RemoteProtocolError):
        protocol.decode_token(data, keys=[KEY])


# --- what is sealed -----------------------------------------------------------


def test_released_is_canonical_msgpack_of_two_fields():
    """Written out from the msgpack specification."""
    expected = b"\x82\xa6bundle\xc4\x03xyz\xa7lease_s\xcd\x0e\x10"
    assert protocol.encode_released(b"xyz", 3600) == expected
    released = protocol.parse_released(expected, error=BadBundleError)
    assert (released.bundle, released.lease_s) == (b"xyz", 3600)
    assert "xyz" not in repr(released)


def test_released_with_older_generations_has_a_third_field():
    expected = (
        b"\x83\xa6bundle\xc4\x03xyz\xa7lease_s\xcd\x0e\x10"
        b"\xa5older\x92\xc4\x01b\xc4\x01a"
    )
    assert protocol.encode_released(b"xyz", 3600, [b"b", b"a"]) == expected
    released = protocol.parse_released(expected, error=BadBundleError)
    assert released.older == (b"b", b"a")
    assert "xyz" not in repr(released)


@given(st.binary(max_size=9000), st.integers(0, protocol.LEASE_MAX_S))
def test_released_round_trip(bundle, lease_s):
    plain = protocol.encode_released(bundle, lease_s)
    released = protocol.parse_released(plain, error=BadBundleError)
    assert (released.bundle, released.lease_s) == (bundle, lease_s)


@pytest.mark.parametrize(
    "value",
    [
        {"bundle": b"xyz"},
        {"lease_s": 0},
        {"bundle": b"xyz", "lease_s": -1},
        {"bundle": b"xyz", "lease_s": protocol.LEASE_MAX_S + 1},
        {"bundle": b"xyz", "lease_s": True},
        {"bundle": b"xyz", "lease_s": None},
        {"bundle": b"xyz", "lease_s": 60.0},
        {"bundle": "xyz", "lease_s": 60},
        {"bundle": b"xyz", "lease_s": 60, "more": 1},
        {"bundle": bytes(74000), "lease_s": 60},
        {"bundle": b"xyz", "lease_s": 60, "older": []},
        {"bundle": b"xyz", "lease_s": 60, "older": None},
        {"bundle": b"xyz", "lease_s": 60, "older": b"xyz"},
        {"bundle": b"xyz", "lease_s": 60, "older": ["xyz"]},
        {"bundle": b"xyz", "lease_s": 60, "older": [b"xyz"] * 8},
        {"bundle": b"xyz", "older": [b"xyz"]},
        [b"xyz", 60],
    ],
)
def test_bad_released_is_refused_and_not_shown(value):
    with pytest.raises(BadBundleError) as caught:
        protocol.parse_released(encode_canonical(value), error=BadBundleError)
    assert "xyz" not in caught.value.message
    assert caught.value.__context__ is None
    assert caught.value.hint


@given(st.binary(max_size=64))
def test_any_other_bytes_are_not_released(data):
    with pytest.raises(BadBundleError):
        protocol.parse_released(data, error=BadBundleError)


def test_released_in_another_order_is_refused():
    plain = b"\x82\xa7lease_s\x00\xa6bundle\xc4\x03xyz"
    with pytest.raises(BadBundleError):
        protocol.parse_released(plain, error=BadBundleError)


# --- evidence -----------------------------------------------------------------


def evidence(**changes):
    good = {
        "token": TOKEN,
        "public_key": b"k" * 1216,
        "volume_ids": ("a", "b"),
        "quote": b"q",
        "event_log": b"",
        "runtime_log": b"",
    }
    return Evidence(**{**good, **changes})


def test_good_evidence_passes():
    protocol.check_evidence(evidence())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token": b""}, "token has 0 bytes, not 92"),
        ({"quote": bytes(16385)}, "quote has 16385 bytes, more than 16384"),
        (
            {"event_log": bytes(2**20 + 1)},
            "event log has 1048577 bytes, more than 1048576",
        ),
        ({"runtime_log": bytes(2**18 + 1)}, "runtime log has 262145 bytes"),
        ({"volume_ids": ()}, "0 volume ids, not 1 to 64"),
        ({"volume_ids": ("b", "a")}, "not unique and sorted"),
        ({"volume_ids": ("a", "a")}, "not unique and sorted"),
        ({"volume_ids": ("A",)}, "volume id 'A' is not"),
    ],
)
def test_bad_evidence_is_named(changes, message):
    with pytest.raises(LocalProtocolError) as caught:
        protocol.check_evidence(evidence(**changes), error=LocalProtocolError)
    assert message in caught.value.message
