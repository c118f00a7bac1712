"""Bundles of collateral: canonical, bounded, and no damage goes unseen."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.errors import DataError
from tdxd.owner.collateral import bundle as collateral_bundle
from tdxd.owner.collateral.bundle import CollateralSet, encode_bundle, parse_bundle
from tdxd.sim.platform import SimPlatform
from tests.collateral import a_set

PLAIN = CollateralSet(
    root="0a" * 48,
    fmspc="00806F050000",
    ca="platform",
    source="https://pccs",
    fetched_s=1_790_000_000,
    collateral={"tcb_info": '{"ü":1}', "pck_crl": "3082"},
)
SMALL = encode_bundle([PLAIN])


def test_round_trip():
    one = a_set(SimPlatform.create())
    for sets in ([], [one], [one, PLAIN, PLAIN]):
        assert parse_bundle(encode_bundle(sets), source="b") == tuple(sets)


def test_every_flipped_bit_is_found():
    for at in range(len(SMALL) * 8):
        data = bytearray(SMALL)
        data[at // 8] ^= 1 << at % 8
        with pytest.raises(DataError):
            parse_bundle(bytes(data), source="b")


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data):
    with pytest.raises(DataError):
        parse_bundle(data, source="b")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from([*json.loads(SMALL), "x"]), inner)
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_json_is_refused(value):
    with pytest.raises(DataError):
        parse_bundle(json.dumps(value).encode(), source="b")


sets = st.builds(
    CollateralSet,
    root=st.text("0123456789abcdef", min_size=96, max_size=96),
    fmspc=st.text("0123456789ABCDEF", min_size=12, max_size=12),
    ca=st.sampled_from(["platform", "processor"]),
    source=st.text(st.characters(categories=["L", "N", "P", "Zs"]), max_size=40).filter(
        str.isprintable
    ),
    fetched_s=st.integers(0, 2**40 - 1),
    collateral=st.dictionaries(
        st.text(max_size=8), st.text(st.characters(exclude_categories=["Cs"]))
    ),
)


@given(st.lists(sets, max_size=4))
def test_what_is_written_is_read(many):
    assert parse_bundle(encode_bundle(many), source="b") == tuple(many)


def resealed(change):
    """A bundle with other content and a digest that fits it."""
    value = json.loads(SMALL)
    body = {"format": value["format"], "sets": value["sets"]}
    change(body)
    digest = collateral_bundle._digest(body)
    return collateral_bundle._canonical({**body, "sha256": digest}) + b"\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.update(format="tdxd/collateral/v2"), "format 'tdxd/coll"),
        (lambda body: body["sets"][0].update(root="0A" * 48), "is not a SHA-384"),
        (
            lambda body: body["sets"][0].update(fmspc="../../etc/pa"),
            "no collateral for",
        ),
        (lambda body: body["sets"][0].update(ca="root"), "no collateral for"),
        (lambda body: body["sets"][0].update(source="a\x1bb"), "not printable"),
        (lambda body: body["sets"][0].update(source="a" * 513), "too long"),
        (lambda body: body["sets"][0].update(fetched_s=-1), "is no time"),
        (lambda body: body["sets"][0].update(fetched_s=1.5), "whole number"),
        (lambda body: body["sets"][0].update(more=1), "unknown key"),
        (lambda body: body["sets"][0].pop("ca"), "missing"),
        (lambda body: body["sets"][0]["collateral"].update(x=7), "expected a string"),
        (lambda body: body.update(sets=body["sets"] * 257), "257 sets, at most 256"),
        (
            lambda body: body["sets"][0]["collateral"].update(x="y" * 4 * 1024 * 1024),
            "is too large",
        ),
        (
            lambda body: body["sets"][0]["collateral"].update(x="\ud800"),
            "",  # canonical ASCII keeps it, `prepare` refuses it
        ),
    ],
)
def test_content_of_a_wrong_kind(change, message):
    data = resealed(change)
    if not message:
        assert parse_bundle(data, source="b")
        return
    with pytest.raises(DataError) as caught:
        parse_bundle(data, source="b")
    assert message in caught.value.message
    assert caught.value.message.startswith("b: ")


@pytest.mark.parametrize(
    "data",
    [
        SMALL + b"\n",
        b" " + SMALL,
        SMALL[:-1],
        SMALL.replace(b'":', b'": ', 1),
        SMALL.replace(b'{"format"', b'{"format":"x","format"', 1),
    ],
)
def test_other_spelling_of_the_same(data):
    with pytest.raises(DataError, match="damaged") as caught:
        parse_bundle(data, source="b")
    assert "export it again" in caught.value.hint


def test_too_much():
    with pytest.raises(DataError, match="at most 16777216"):
        parse_bundle(b" " * (16 * 1024 * 1024 + 1), source="b")


def test_too_deep():
    with pytest.raises(DataError, match="no collateral bundle"):
        parse_bundle(b"[" * 100_000, source="b")


def test_a_set_is_what_it_was():
    one = a_set(SimPlatform.create())
    assert json.loads(one.text()) == one.collateral
