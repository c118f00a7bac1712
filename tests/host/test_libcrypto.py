"""The fast cipher gives what the plain one gives."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core import sealed
from tdxd.host import libcrypto

pytestmark = pytest.mark.skipif(
    not libcrypto.available(), reason="no libcrypto.so.3 on this system"
)
KEY = hashlib.shake_256(b"key").digest(64)
RUN = hashlib.shake_256(b"run").digest(3 * 4096)


def fast(data: bytes, first_block: int, *, encrypt: bool) -> bytes:
    source, target = bytearray(data), bytearray(len(data))
    xts = libcrypto.Xts(KEY, encrypt=encrypt)
    xts.run(first_block, memoryview(source), memoryview(target))
    xts.close()
    return bytes(target)


def plain(data: bytes, first_block: int, *, encrypt: bool) -> bytes:
    out = bytearray(len(data) + sealed.RUN_SLACK_BYTES)
    run = sealed.encrypt_run if encrypt else sealed.decrypt_run
    run(KEY, first_block, memoryview(data), memoryview(out))
    return bytes(out[: len(data)])


@given(st.integers(0, 2**40), st.booleans())
def test_both_ways_agree(first_block, encrypt):
    assert fast(RUN, first_block, encrypt=encrypt) == plain(
        RUN, first_block, encrypt=encrypt
    )


def test_decrypting_undoes_encrypting():
    assert fast(fast(RUN, 7, encrypt=True), 7, encrypt=False) == RUN


def test_one_context_serves_run_after_run():
    xts = libcrypto.Xts(KEY, encrypt=True)
    source, target = bytearray(RUN), bytearray(len(RUN))
    for first in (5, 0, 5):
        xts.run(first, memoryview(source), memoryview(target))
        assert target == plain(RUN, first, encrypt=True)
    xts.close()
    xts.close()


def test_equal_halves_of_the_key_are_refused():
    with pytest.raises(RuntimeError, match="refuses"):
        libcrypto.Xts(bytes(64), encrypt=True)


def test_a_short_key_is_refused():
    with pytest.raises(ValueError, match="not 32"):
        libcrypto.Xts(bytes(32), encrypt=True)


def test_a_part_of_a_block_is_refused():
    xts = libcrypto.Xts(KEY, encrypt=True)
    with pytest.raises(AssertionError):
        xts.run(0, memoryview(bytearray(100)), memoryview(bytearray(100)))
    xts.close()
