"""The strict reader of LUKS2 headers: one shape is taken, and nothing that differs from it."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core import luks2
from tdxd.core.bundle import KeyBundle, Manifest
from tdxd.core.luks2_read import (
    COPIES_BYTES,
    REGION_MAX_BYTES,
    Luks2Header,
    read_luks2,
)
from tdxd.core.secret import Secret
from tdxd.errors import BadHeaderError
from tests.attacks.luks2_forgery import Luks2File, compact

BUNDLE = KeyBundle(
    manifest=Manifest(
        volume_id="m",
        generation=1,
        payload_offset_bytes=luks2.PAYLOAD_OFFSET_BYTES,
        data_blocks=1,
        hash_blocks=0,
        root_hash=bytes(32),
        salt=bytes(32),
    ),
    secret=Secret(bytes(range(64))),
)
COPIES = luks2.build_header(BUNDLE, recovery=True)[:COPIES_BYTES]
DOCUMENT = Luks2File(bytearray(COPIES)).document
IMAGE_BYTES = 20 * 2**20
SALT = DOCUMENT["keyslots"]["0"]["kdf"]["salt"]
ARGON2ID = {"type": "argon2id", "time": 4, "memory": 2**20, "cpus": 4, "salt": SALT}


def read(copies: bytes, *, image_bytes: int = IMAGE_BYTES) -> Luks2Header:
    return read_luks2(copies, image_bytes=image_bytes, source="m.img")


def forged(document: Any) -> bytes:
    return forged_text(compact(document))


def forged_text(text: bytes) -> bytes:
    file = Luks2File(bytearray(COPIES))
    file.put_text(text)
    return bytes(file.data)


def refusal(copies: bytes, **options: int) -> BadHeaderError:
    with pytest.raises(BadHeaderError) as caught:
        read(copies, **options)
    return caught.value


def changed(*path: str, value: Any) -> dict[str, Any]:
    document = copy.deepcopy(DOCUMENT)
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return document


def with_keyslots(*kdfs: dict[str, Any]) -> dict[str, Any]:
    """The document with one keyslot per key derivation."""
    document = copy.deepcopy(DOCUMENT)
    slot = document["keyslots"].pop("0")
    for number, kdf in enumerate(kdfs):
        area = slot["area"] | {"offset": str(32768 + number * 258048)}
        document["keyslots"][str(number)] = slot | {"area": area, "kdf": kdf}
    document["digests"]["0"]["keyslots"] = list(document["keyslots"])
    return document


def paths(value: Any = DOCUMENT, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [path] if path else []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += paths(inner, (*path, key))
    return found


def test_what_it_tells():
    header = read(COPIES)
    assert (header.payload_offset_bytes, header.sector_bytes) == (16 * 2**20, 4096)
    assert header.payload_bytes == 4 * 2**20
    assert header.uuid.encode() == COPIES[168:204]
    (slot,) = header.keyslots
    assert (slot.area_offset_bytes, slot.kdf.memory_bytes) == (32768, 0)
    assert header.digest.iterations == 1000


def test_the_payload_ends_with_a_whole_sector():
    assert read(COPIES, image_bytes=IMAGE_BYTES - 1).payload_bytes == 4 * 2**20 - 4096
    small = forged(changed("segments", "0", "sector_size", value=512))
    assert read(small, image_bytes=IMAGE_BYTES - 1).payload_bytes == 4 * 2**20 - 512
    assert "payload begins at" in refusal(COPIES, image_bytes=2**24 + 4095).message
    assert "payload begins at" in refusal(COPIES, image_bytes=0).message


def test_what_follows_the_copies_does_not_matter():
    assert read(COPIES + b"x" * 100) == read(COPIES)


@given(st.integers(0, COPIES_BYTES - 1))
def test_a_cut_header_is_refused(size):
    assert "inside its LUKS2 header" in refusal(COPIES[:size]).message


@given(st.integers(0, COPIES_BYTES - 1), st.integers(1, 255))
def test_any_changed_byte_is_refused(offset, flip):
    data = bytearray(COPIES)
    data[offset] ^= flip
    refusal(bytes(data))


@given(st.binary(max_size=COPIES_BYTES + 1))
def test_other_bytes_are_refused(data):
    refusal(data)
    refusal(data.ljust(COPIES_BYTES, b"\0"))


BINARY_FIELDS = {
    "version": (6, ">H", 3),
    "hdr_size": (8, ">Q", 32768),
    "label": (24, "5s", b"label"),
    "csum_alg": (72, "7s", b"sha512\0"),
    "uuid": (168, "4s", b"\x1b[2J"),
    "subsystem": (208, "5s", b"evil."),
    "hdr_offset": (256, ">Q", 4096),
    "padding": (264, "B", 1),
}


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("field", BINARY_FIELDS)
def test_a_wrong_field_of_the_binary_header_is_named(field, number):
    offset, form, value = BINARY_FIELDS[field]
    file = Luks2File(bytearray(COPIES))
    struct.pack_into(form, file.data, number * 16384 + offset, value)
    file.seal(number * 16384, 16384)
    message = refusal(bytes(file.data)).message
    assert f"copy {number + 1}: {field}" in message
    assert message.isprintable()


@pytest.mark.parametrize("offset", [512, 4095, 500, 511])
def test_bytes_behind_the_fields_are_zero(offset):
    file = Luks2File(bytearray(COPIES))
    if offset < 512:  # of the checksum's own field, which the checksum leaves out
        file.data[offset] = 1
    else:
        file.data[offset] = 1
        file.seal(0, 16384)
    refusal(bytes(file.data))


@pytest.mark.parametrize("field", ["sequence", "uuid", "area"])
def test_copies_that_differ_are_refused(field):
    file = Luks2File(bytearray(COPIES))
    if field == "sequence":
        file.set_sequence(1, 2)
    elif field == "uuid":
        file.data[16384 + 168] = ord("0") + (file.data[16384 + 168] == ord("0"))
        file.seal(16384, 16384)
    else:
        document = changed("digests", "0", "iterations", value=1001)
        file.put(document, copies=(1,))
    assert f"differ in their {field}" in refusal(bytes(file.data)).message


def test_luks1_is_refused_with_the_way_out():
    error = refusal(b"LUKS\xba\xbe\0\1" + bytes(COPIES_BYTES))
    assert "LUKS1" in error.message
    assert "cryptsetup convert --type luks2" in error.hint


# --- the JSON area ------------------------------------------------------------


@pytest.mark.parametrize("path", paths(), ids=".".join)
def test_every_key_is_needed(path):
    document = copy.deepcopy(DOCUMENT)
    place = document
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    refusal(forged(document))


@pytest.mark.parametrize(
    "path",
    [(), *(path for path in paths() if path != ("tokens",))],
    ids=lambda path: ".".join(path) or "top",
)
def test_no_other_key_is_taken(path):
    document = copy.deepcopy(DOCUMENT)
    place: Any = document
    for key in path:
        place = place[key]
    if isinstance(place, dict):
        place["priority"] = 1
    else:
        document = changed(*path, value={"x": place})
    refusal(forged(document))


@pytest.mark.parametrize("path", paths(), ids=".".join)
@pytest.mark.parametrize(
    "value", [None, True, 0, 1, -1, "", "0", [], ["0"], {}, "aes-xts-plain64\0"]
)
def test_no_other_kind_of_value_is_taken(path, value):
    document = changed(*path, value=value)
    if document == DOCUMENT:
        return
    message = refusal(forged(document)).message
    assert message.startswith("m.img: LUKS2 header: ")
    assert message.isprintable()


REFUSED = {
    "keyslots.0.kdf: iterations 999": (("keyslots", "0", "kdf", "iterations"), 999),
    "keyslots.0.kdf: iterations 10000001": (
        ("keyslots", "0", "kdf", "iterations"),
        10**7 + 1,
    ),
    "keyslots.0.kdf: salt": (("keyslots", "0", "kdf", "salt"), "AAAA"),
    "keyslots.0.kdf.hash": (("keyslots", "0", "kdf", "hash"), "sha1"),
    "keyslots.0.kdf.type": (("keyslots", "0", "kdf", "type"), "argon2i"),
    "keyslots.0.kdf: time 3": (("keyslots", "0", "kdf"), ARGON2ID | {"time": 3}),
    "keyslots.0.kdf: time 17": (("keyslots", "0", "kdf"), ARGON2ID | {"time": 17}),
    "keyslots.0.kdf: memory 1048577": (
        ("keyslots", "0", "kdf"),
        ARGON2ID | {"memory": 2**20 + 1},
    ),
    "keyslots.0.kdf: memory 31": (("keyslots", "0", "kdf"), ARGON2ID | {"memory": 31}),
    "keyslots.0.kdf: cpus 5": (("keyslots", "0", "kdf"), ARGON2ID | {"cpus": 5}),
    "keyslots.0.kdf: cpus 0": (("keyslots", "0", "kdf"), ARGON2ID | {"cpus": 0}),
    "keyslots.0.key_size": (("keyslots", "0", "key_size"), 32),
    "keyslots.0.af.stripes": (("keyslots", "0", "af", "stripes"), 1),
    "keyslots.0.af.hash": (("keyslots", "0", "af", "hash"), "sha512"),
    "keyslots.0.area: offset '4097'": (("keyslots", "0", "area", "offset"), "4097"),
    "keyslots.0.area: offset '-4096'": (("keyslots", "0", "area", "offset"), "-4096"),
    "keyslots.0.area: offset '032768'": (("keyslots", "0", "area", "offset"), "032768"),
    "keyslots.0.area: offset '9": (("keyslots", "0", "area", "offset"), "9" * 5000),
    "keyslots: area at 28672": (("keyslots", "0", "area", "offset"), "28672"),
    "config.keyslots_size: areas end": (("config", "keyslots_size"), "253952"),
    "segments.0.offset: payload at 16773120": (("segments", "0", "offset"), "16773120"),
    "segments.0.offset: 67112960": (("segments", "0", "offset"), "67112960"),
    "segments.0.sector_size": (("segments", "0", "sector_size"), 1024),
    "digests.0: iterations 2000001": (("digests", "0", "iterations"), 2 * 10**6 + 1),
    "digests.0: iterations 999": (("digests", "0", "iterations"), 999),
    "digests.0: digest": (("digests", "0", "digest"), "AAAA"),
    "digests.0: segments": (("digests", "0", "segments"), []),
    "digests: names keyslots": (("digests", "0", "keyslots"), []),
    "digests: 2": (("digests", "1"), DOCUMENT["digests"]["0"]),
    "keyslots: '32'": (("keyslots", "32"), DOCUMENT["keyslots"]["0"]),
    "tokens": (("tokens",), {"0": {"type": "systemd-tpm2", "keyslots": ["0"]}}),
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_value_out_of_bounds_is_named(text):
    path, value = REFUSED[text]
    error = refusal(forged(changed(*path, value=value)))
    assert text in error.message
    assert len(error.message) < 250
    assert error.hint


def test_the_payload_may_begin_at_the_greatest_offset():
    document = changed("segments", "0", "offset", value=str(REGION_MAX_BYTES))
    read(forged(document), image_bytes=REGION_MAX_BYTES + 4096)


def test_keyslots_and_digest_may_have_other_numbers():
    """As a reencryption leaves them."""
    document = copy.deepcopy(DOCUMENT)
    document["keyslots"] = {"31": document["keyslots"]["0"]}
    document["digests"] = {"1": document["digests"]["0"] | {"keyslots": ["31"]}}
    assert len(read(forged(document)).keyslots) == 1


def test_eight_keyslots_are_taken_and_nine_are_not():
    kdf = DOCUMENT["keyslots"]["0"]["kdf"]
    assert len(read(forged(with_keyslots(*[kdf] * 8))).keyslots) == 8
    assert "keyslots: 9" in refusal(forged(with_keyslots(*[kdf] * 9))).message


def test_keyslots_together_may_cost_what_two_at_the_cap_do():
    large = ARGON2ID  # a quarter of the cap
    greatest = DOCUMENT["keyslots"]["0"]["kdf"] | {"iterations": 10**7}
    for kdfs in ([large] * 8, [greatest] * 2, [greatest, *[large] * 4]):
        read(forged(with_keyslots(*kdfs)))
    for kdfs in ([greatest] * 3, [greatest] * 8, [greatest, *[large] * 5]):
        error = refusal(forged(with_keyslots(*kdfs)))
        assert "times what the costliest may cost" in error.message


def test_the_digest_is_made_once_for_each_keyslot_and_counts_so():
    """luksFormat asks for 250,000 here, and for more on a faster processor."""
    document = with_keyslots(*[DOCUMENT["keyslots"]["0"]["kdf"]] * 8)
    document["digests"]["0"]["iterations"] = 625_000
    read(forged(document))
    document["digests"]["0"]["iterations"] += 1
    text = "digests: 625001 iterations for each of 8 keyslots"
    assert text in refusal(forged(document)).message


def test_areas_do_not_overlap():
    document = with_keyslots(*[DOCUMENT["keyslots"]["0"]["kdf"]] * 2)
    document["keyslots"]["1"]["area"]["offset"] = str(32768 + 4096)
    assert "begins before" in refusal(forged(document)).message


TEXTS = {
    "space": compact(DOCUMENT).replace(b":", b": ", 1),
    "comment": compact(DOCUMENT).replace(b"{", b"{/**/", 1),
    "single quotes": compact(DOCUMENT).replace(b'"', b"'"),
    "escaped letter": compact(DOCUMENT).replace(b'"tokens"', b'"\\u0074okens"'),
    "escaped slash": compact(DOCUMENT).replace(b'"digest":"', b'"digest":"\\/', 1),
    "duplicate": compact(DOCUMENT).replace(b'"tokens"', b'"tokens":{},"tokens"', 1),
    "float": compact(DOCUMENT).replace(b"4000", b"4000.0"),
    "exponent": compact(DOCUMENT).replace(b"4000", b"4e3"),
    "NaN": compact(DOCUMENT).replace(b"4000", b"NaN"),
    "plus": compact(DOCUMENT).replace(b"4000", b"+4000"),
    "zero in front": compact(DOCUMENT).replace(b"4000", b"04000"),
    "huge": compact(DOCUMENT).replace(b"4000", b"9" * 5000),
    "UTF-8": compact(DOCUMENT).replace(b'"sha256"', "“sha256”".encode()),
    "not ASCII": compact(DOCUMENT).replace(b"sha256", b"sha256\xff"),
    "nothing": b"",
    "no object": b"[]",
    "two": compact(DOCUMENT) + compact({}),
    "behind NUL": compact(DOCUMENT) + b"\0x",
    "deep": b"[" * 6000 + b"]" * 6000,
    "deep objects": b'{"a":' * 2000 + b"1" + b"}" * 2000,
    "long key": compact(DOCUMENT).replace(b'"tokens"', b'"' + b"t" * 5000 + b'"'),
}


@pytest.mark.parametrize("name", TEXTS)
def test_json_that_cryptsetup_would_not_write_is_refused(name):
    error = refusal(forged_text(TEXTS[name]))
    assert error.message.startswith("m.img: LUKS2 header: ")
    assert len(error.message) < 250


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.sampled_from(["0", "1", "crypt", "linear", "raw", "32768", "dynamic"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(st.sampled_from(paths()), JSON)
def test_whatever_stands_in_a_field_ends_in_a_header_within_bounds_or_a_refusal(
    path, value
):
    text = compact(changed(*path, value=value))
    if len(text) > 12288:
        return
    with contextlib.suppress(BadHeaderError):
        check_bounds(read(forged_text(text)))


def check_bounds(header: Luks2Header) -> None:
    assert 1 <= len(header.keyslots) <= 8
    assert header.payload_offset_bytes % 4096 == 0
    assert header.payload_offset_bytes <= REGION_MAX_BYTES
    end = COPIES_BYTES
    for slot in sorted(header.keyslots, key=lambda slot: slot.area_offset_bytes):
        assert slot.area_offset_bytes >= end
        end = slot.area_offset_bytes + 258048
        assert slot.kdf.memory_bytes <= 2**30
        assert slot.kdf.cost <= 1
    assert end <= header.payload_offset_bytes
    assert sum(slot.kdf.cost for slot in header.keyslots) <= 2
    assert header.digest.iterations <= 2 * 10**6


def test_reading_derives_nothing(monkeypatch):
    """Every cap is checked before any work: no key derivation runs, whatever is asked for."""

    def derived(*args, **kwargs):
        raise AssertionError(args)

    monkeypatch.setattr(hashlib, "pbkdf2_hmac", derived)
    read(COPIES)
    for path, value in REFUSED.values():
        refusal(forged(changed(*path, value=value)))


def test_the_written_header_is_one_that_the_reader_takes():
    assert json.loads(Luks2File(bytearray(COPIES)).text) == DOCUMENT
