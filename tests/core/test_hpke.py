"""HPKE: the wire form of keys, and what is bound."""

from __future__ import annotations

import pytest

from tdxd.core import hpke
from tdxd.core.secret import Secret
from tdxd.errors import BadBundleError, RemoteProtocolError

P = 2**255 - 19


def pair(byte=7):
    return hpke.key_pair(Secret(bytes([byte]) * 96))


def test_key_pair_is_a_function_of_the_seed():
    assert pair().public == pair().public
    assert pair().public != pair(8).public
    assert len(pair().public) == 1184 + 32


def test_seal_and_open():
    key = hpke.parse_public_key(pair().public)
    sealed = hpke.seal(b"bundle", key, b"info")
    assert len(sealed) == 6 + hpke.OVERHEAD_BYTES == 6 + 1136
    plain = hpke.open_sealed(
        sealed, pair().private, b"info", error=BadBundleError, what="x"
    )
    assert plain == b"bundle"


@pytest.mark.parametrize("case", ["info", "key", "flip", "short", "empty"])
def test_what_does_not_open(case):
    sealed = hpke.seal(b"bundle", hpke.parse_public_key(pair().public), b"info")
    private = pair(8).private if case == "key" else pair().private
    info = b"Info" if case == "info" else b"info"
    data = {
        "flip": sealed[:-1] + bytes([sealed[-1] ^ 1]),
        "short": sealed[:40],
        "empty": b"",
    }.get(case, sealed)
    with pytest.raises(BadBundleError, match="bundle of v does not open"):
        hpke.open_sealed(data, private, info, error=BadBundleError, what="bundle of v")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "low order"),
        (1, "low order"),
        (P - 1, "low order"),
        (
            325606250916557431795983626356110631294008115727848805560023387167927233504,
            "low order",
        ),
        (P, "canonical"),
        (P + 9, "canonical"),
        (2**255 + 9, "canonical"),
        (2**256 - 1, "canonical"),
    ],
)
def test_bad_x25519_points_are_refused(value, message):
    data = pair().public[:1184] + value.to_bytes(32, "little")
    with pytest.raises(RemoteProtocolError, match=message):
        hpke.parse_public_key(data)


def test_mlkem_coefficient_of_the_modulus_is_refused():
    """3329 in twelve bits, little-endian: FIPS 203 asks for the modulus check."""
    public = bytearray(pair().public)
    public[0], public[1] = 0x01, public[1] & 0xF0 | 0x0D
    with pytest.raises(RemoteProtocolError, match="ML-KEM-768"):
        hpke.parse_public_key(bytes(public))


@pytest.mark.parametrize("size", [0, 32, 1184, 1215, 1217])
def test_other_sizes_are_refused(size):
    with pytest.raises(RemoteProtocolError, match=f"{size} bytes, not 1216"):
        hpke.parse_public_key(bytes(size))
