"""One audit record: its bytes are canonical msgpack, and the chain is what the protocol says."""

from __future__ import annotations

import dataclasses
import hashlib

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core.check import Check
from tdxd.core.decode import encode_canonical, plain
from tdxd.errors import DataError
from tdxd.owner.audit.record import (
    GENESIS,
    AuditRecord,
    bounded,
    chain_hash,
    encode_record,
    parse_record,
)
from tests.keyserver import opened_owner, policy_text
from tests.owner.test_store import record

VECTOR = AuditRecord(
    at_s=1764072000,
    request_id="0011223344556677",
    denial_id="8899aabbccddeeff",
    volume_id="resnet",
    generation=0,
    decision="denied",
    reason="tcb-status",
    peer="ipv4:192.0.2.1:40000",
    simulated=False,
    policy_version=3,
    report_data="",
    checks=(
        Check(name="token", expected="ours", actual="ours", ok=True),
        Check(name="tcb_status", expected="UpToDate", actual="OutOfDate", ok=False),
    ),
)
"""The example of docs/protocol.md."""

texts = st.text(max_size=8)
numbers = st.integers(0, 2**63 - 1)
records = st.builds(
    AuditRecord,
    seq=st.just(0),
    at_s=numbers,
    request_id=texts,
    denial_id=st.none() | texts,
    volume_id=texts,
    generation=numbers,
    decision=texts,
    reason=texts,
    peer=texts,
    simulated=st.booleans(),
    policy_version=numbers,
    report_data=texts,
    checks=st.lists(
        st.builds(Check, name=texts, expected=texts, actual=texts, ok=st.booleans()),
        max_size=3,
    ).map(tuple),
    lease_s=numbers,
)


@given(records, numbers)
def test_round_trip_in_canonical_form(made, seq):
    data = encode_record(made, seq)
    assert encode_canonical(msgpack.unpackb(data)) == data
    assert parse_record(data, source="it") == dataclasses.replace(made, seq=seq)


def test_the_record_has_every_field():
    """A field that is added later must be in the bytes, or nothing protects it."""
    names = {field.name for field in dataclasses.fields(AuditRecord)}
    assert set(msgpack.unpackb(encode_record(record(), 1))) == names


@given(st.binary(max_size=40))
def test_other_bytes_are_no_record(data):
    with pytest.raises(DataError):
        parse_record(data, source="it")


@pytest.mark.parametrize(
    "change",
    [
        {"seq": "1"},
        {"seq": True},
        {"denial_id": 5},
        {"checks": [["a", True]]},
        {"checks": [["a", 1, "x"]]},
        {"checks": [["a", True, "x", "x"]]},
        {"checks": ["a"]},
        {"more": 1},
    ],
)
def test_wrong_fields_are_refused(change):
    fields = msgpack.unpackb(encode_record(record(), 1))
    with pytest.raises(DataError):
        parse_record(encode_canonical({**fields, **change}), source="it")


def test_missing_field_is_refused():
    fields = msgpack.unpackb(encode_record(record(), 1))
    del fields["lease_s"]
    with pytest.raises(DataError, match="not the fields of a record"):
        parse_record(encode_canonical(fields), source="it")


def test_other_order_of_keys_is_refused():
    fields = msgpack.unpackb(encode_record(record(), 1))
    turned = msgpack.packb(dict(reversed(fields.items())))
    with pytest.raises(DataError, match="not in canonical form"):
        parse_record(turned, source="it")


def test_chain_byte_by_byte():
    one, two = encode_record(record(), 1), encode_record(record(), 2)
    label = b"\x00\x00\x00\x0dtdxd/audit/v1"
    size = len(one).to_bytes(4, "big")
    first = hashlib.sha256(label + bytes(32) + size + one).digest()
    assert chain_hash(GENESIS, one) == first
    second = hashlib.sha256(label + first + size + two).digest()
    assert chain_hash(first, two) == second


def test_vector_of_the_protocol():
    data = encode_record(VECTOR, 1)
    assert len(data) == 346
    assert data.hex().startswith("de0013a461745f73ce69259a40a6636865636b7392")
    assert chain_hash(GENESIS, data).hex() == (
        "27f0fe63d89cd207dff3cd2766d9fe846d24e11540717ee6ab30cfb7461593d1"
    )
    assert plain(parse_record(data, source="it")) == plain(
        dataclasses.replace(VECTOR, seq=1)
    )


@given(st.integers(0, 2000), st.integers(0, 2000))
def test_long_texts_of_checks_are_cut_in_the_middle(before, after):
    expected, actual = "e" * before, "s" + "a" * after + "z"
    check = Check(name="c", expected=expected, actual=actual, ok=False)
    (kept,) = bounded([check])
    assert (kept.name, kept.ok) == ("c", False)
    for cut, whole in ((kept.expected, expected), (kept.actual, actual)):
        assert len(cut) <= 512
        if len(whole) <= 512:
            assert cut == whole
        else:
            assert cut[:200] == whole[:200]
            assert cut[-200:] == whole[-200:]
            assert "characters …" in cut
    assert bounded([kept]) == (kept,)


async def test_worst_record_of_a_denial(tmp_path):
    """Alternatives of the policy and texts of the guest fill every check that shows them."""
    with opened_owner(tmp_path) as owner:
        many = ", ".join(f'"{index:096x}"' for index in range(500))
        registers = ", ".join(f'rtmr{index} = "{"ab" * 48}"' for index in range(4))
        sets = ", ".join(
            f'{{ name = "{index:064}", {registers} }}' for index in range(60)
        )
        advisories = ", ".join(f'"INTEL-SA-{index:05}"' for index in range(500))
        volumes = ", ".join(f'"{index:063}"' for index in range(500))
        xfam = ", ".join(f'"{index:016x}"' for index in range(500))
        text = policy_text(
            owner.platform,
            mrtd=f"[{many}]",
            mr_seam=f"[{many}]",
            rtmr=f"[{sets}]",
            xfam=f"[{xfam}]",
            advisories_refused=f"[{advisories}]",
            release=f"[runtime]\nvolumes = [{volumes}]\n",
        )
        owner.add("v")
        with owner.store.transaction() as change:
            change.set_policy("v", text, 9)
        await owner.fetch("v")
        made = owner.last()
        assert made.reason == "measurements", owner.failed()
        longest = {len(t) for one in made.checks for t in (one.expected, one.actual)}
        assert 490 < max(longest) <= 512
        assert len(encode_record(made, 1)) < 12 * 1024
