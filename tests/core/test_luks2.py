"""The LUKS2 header: fixed shape, read back, and never a crash on other bytes."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tdxd.core import luks2
from tdxd.core.bundle import KeyBundle, Manifest
from tdxd.core.secret import Secret
from tdxd.errors import DataError


def bundle(**changes: object) -> KeyBundle:
    fields: dict[str, object] = {
        "volume_id": "m",
        "generation": 1,
        "payload_offset_bytes": luks2.PAYLOAD_OFFSET_BYTES,
        "data_blocks": 1,
        "hash_blocks": 0,
        "root_hash": bytes(32),
        "salt": bytes(32),
    }
    manifest = Manifest(**(fields | changes))  # type: ignore[arg-type]
    return KeyBundle(manifest=manifest, secret=Secret(bytes(range(64))))


HEADER = luks2.build_header(bundle(), recovery=False)


def test_it_reads_back():
    header = luks2.read_header(HEADER, source="x")
    assert (header.cipher, header.sector_bytes) == ("aes-xts-plain64", 4096)
    assert (header.payload_offset_bytes, header.keyslots) == (16777216, 0)


def test_without_recovery_the_keyslot_area_is_empty():
    assert HEADER[32768:] == bytes(258048)


def test_both_copies_have_the_same_json_but_other_salts():
    assert HEADER[4096:16384] == HEADER[20480:32768]
    assert HEADER[104:168] != HEADER[16384 + 104 : 16384 + 168]
    assert (HEADER[:6], HEADER[16384:16390]) == (b"LUKS\xba\xbe", b"SKUL\xba\xbe")


def test_the_json_holds_no_more_than_it_must():
    document = json.loads(HEADER[4096:16384].rstrip(b"\0"))
    assert document["keyslots"] == document["tokens"] == {}
    assert document["digests"]["0"]["keyslots"] == []
    assert document["digests"]["0"]["segments"] == ["0"]
    assert document["config"] == {"json_size": "12288", "keyslots_size": "16744448"}


@pytest.mark.parametrize("changes", [{"volume_id": "n"}, {"generation": 2}])
def test_another_volume_or_generation_shares_no_salt(changes):
    other = luks2.build_header(bundle(**changes), recovery=False)
    for span in (slice(104, 168), slice(168, 208), slice(16488, 16552)):
        assert HEADER[span] != other[span]
    passphrases = {
        luks2.recovery_passphrase(one).reveal() for one in (bundle(), bundle(**changes))
    }
    assert len(passphrases) == 2


def test_the_keyslot_does_not_show_the_key():
    made = luks2.build_header(bundle(), recovery=True)
    area = made[32768:]
    assert area[:256000].count(bytes(16)) == 0
    assert luks2.recovery_passphrase(bundle()).reveal() not in made


@given(st.integers(0, 16383), st.integers(1, 255))
@example(offset=500, flip=1)  # behind the checksum, in its field
def test_any_changed_byte_is_noticed(offset, flip):
    data = bytearray(HEADER)
    data[offset] ^= flip
    with pytest.raises(DataError):
        luks2.read_header(bytes(data), source="x")


@given(st.binary(max_size=20000))
def test_other_bytes_are_refused(data):
    for start in (b"", luks2.MAGIC):
        with pytest.raises(DataError):
            luks2.read_header(start + data, source="x")
