"""Runs of sealed blocks, and the public record."""

from __future__ import annotations

import hashlib
import json

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core import sealed, verity
from tdxd.errors import DataError

KEY = hashlib.shake_256(b"key").digest(64)
SALT = bytes(32)
PLAIN = hashlib.shake_256(b"plain").digest(5 * 4096)
RECORD = sealed.PublicRecord(
    id="m", generation=3, size_bytes=9, sha256="0" * 64, created="2026-01-01T00:00:00Z"
)


def room() -> bytearray:
    return bytearray(len(PLAIN) + sealed.RUN_SLACK_BYTES)


def encrypt(first_block: int = 0) -> bytes:
    out = room()
    sealed.encrypt_run(KEY, first_block, memoryview(PLAIN), memoryview(out))
    return bytes(out[: len(PLAIN)])


def open_run(data: bytes, first_block: int = 0, digests: bytes | None = None) -> int:
    want = verity.run_digests(SALT, memoryview(PLAIN)) if digests is None else digests
    return sealed.open_run(
        KEY,
        SALT,
        first_block=first_block,
        run=memoryview(data),
        digests=memoryview(want),
        out=memoryview(room()),
    )


def test_the_tweak_counts_512_byte_sectors():
    tweak = (8 * 1002).to_bytes(16, "little")
    cipher = Cipher(algorithms.AES(KEY), modes.XTS(tweak)).encryptor()
    assert encrypt(1000)[8192:12288] == cipher.update(PLAIN[8192:12288])


@given(st.integers(0, 2**40))
def test_decrypt_undoes_encrypt(first_block):
    out = room()
    sealed.decrypt_run(
        KEY, first_block, memoryview(encrypt(first_block)), memoryview(out)
    )
    assert out[: len(PLAIN)] == PLAIN


def test_an_intact_run_opens():
    assert open_run(encrypt()) == -1


@pytest.mark.parametrize("at", [0, 4095, 4096, 5 * 4096 - 1])
def test_a_flipped_byte_names_its_block(at):
    data = bytearray(encrypt())
    data[at] ^= 1
    assert open_run(bytes(data)) == at // 4096


def test_a_block_moved_elsewhere_is_found():
    assert open_run(encrypt(1), first_block=0) == 0


def test_missing_digests_are_a_mismatch():
    assert open_run(encrypt(), digests=b"") == 0


def test_the_record_survives_a_round_trip():
    assert sealed.PublicRecord.parse(RECORD.encode(), source="x") == RECORD


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"size_bytes": "9"}, "size_bytes: expected a whole number"),
        ({"size_bytes": 0}, "at least 1"),
        ({"sha256": "0" * 63}, "64 lower-case hex"),
        ({"id": "../x"}, "volume id"),
        ({"format": 2}, "format"),
        ({"extra": 1}, "extra: unknown key"),
    ],
)
def test_a_wrong_record_is_refused(change, text):
    value = json.loads(RECORD.encode()) | change
    with pytest.raises(DataError, match=text):
        sealed.PublicRecord.parse(json.dumps(value).encode(), source="x")


def test_a_duplicate_key_is_refused():
    data = RECORD.encode().replace(b'"id"', b'"id": "a", "id"')
    with pytest.raises(DataError, match="not valid JSON"):
        sealed.PublicRecord.parse(data, source="x")


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_not_crashed_on(data):
    with pytest.raises(DataError):
        sealed.PublicRecord.parse(data, source="x")


def test_a_huge_record_is_refused():
    with pytest.raises(DataError, match="at most 4096"):
        sealed.PublicRecord.parse(b" " * 5000, source="x")
