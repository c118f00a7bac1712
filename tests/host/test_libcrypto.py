"""The fast cipher gives what the plain one gives."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core import sealed
from tdxd.host import libcrypto, range_worker

pytestmark = pytest.mark.skipif(
    not libcrypto.available(), reason="no libcrypto.so.3 on this system"
)
KEY = hashlib.shake_256(b"key").digest(64)
RUN = hashlib.shake_256(b"run").digest(3 * 4096)


def blocks(buffer: bytearray, gap_bytes: int = 0) -> list[memoryview]:
    return range_worker.blocks_of(buffer, gap_bytes)


def xts(source: bytearray, target: bytearray, *, encrypt: bool) -> libcrypto.Xts:
    return libcrypto.Xts(
        KEY, encrypt=encrypt, sources=blocks(source), targets=blocks(target)
    )


def fast(data: bytes, first_block: int, *, encrypt: bool) -> bytes:
    source, target = bytearray(data), bytearray(len(data))
    made = xts(source, target, encrypt=encrypt)
    made.run(first_block, len(data) // 4096)
    made.close()
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
    source, target = bytearray(RUN), bytearray(len(RUN))
    made = xts(source, target, encrypt=True)
    for first in (5, 0, 5):
        made.run(first, 3)
        assert target == plain(RUN, first, encrypt=True)
    made.close()
    made.close()


def test_blocks_with_gaps_leave_the_gaps_alone():
    target = bytearray(b"gap!" * 1024 * 4)
    made = libcrypto.Xts(
        KEY, encrypt=True, sources=blocks(bytearray(RUN)), targets=blocks(target, 64)
    )
    made.run(9, 3)
    want = plain(RUN, 9, encrypt=True)
    for index in range(3):
        start = index * (64 + 4096)
        assert target[start : start + 64] == b"gap!" * 16
        assert (
            target[start + 64 : start + 4160] == want[index * 4096 : (index + 1) * 4096]
        )
    made.close()


@given(st.integers(0, 2**40), st.integers(0, 3), st.booleans())
def test_sectors_of_512_bytes_agree_with_the_plain_way(first_block, count, encrypt):
    source, target = bytearray(RUN), bytearray(len(RUN))
    made = libcrypto.Xts(
        KEY,
        encrypt=encrypt,
        sources=blocks(source),
        targets=blocks(target),
        sector_bytes=512,
    )
    made.run(first_block, count)
    out = bytearray(len(RUN) + sealed.RUN_SLACK_BYTES)
    run = sealed.encrypt_run if encrypt else sealed.decrypt_run
    run(KEY, first_block, memoryview(RUN), memoryview(out), sector_bytes=512)
    size = count * 4096
    assert target == out[:size] + bytes(len(RUN) - size)
    made.close()


def test_only_the_asked_blocks_are_written():
    target = bytearray(len(RUN))
    made = xts(bytearray(RUN), target, encrypt=True)
    made.run(0, 1)
    assert target == plain(RUN[:4096], 0, encrypt=True) + bytes(8192)
    made.close()


def test_the_buffers_live_as_long_as_they_are_pointed_to():
    source = bytearray(RUN)
    made = xts(source, bytearray(len(RUN)), encrypt=True)
    with pytest.raises(BufferError):
        source.clear()
    made.close()
    source.clear()


def test_equal_halves_of_the_key_are_refused():
    with pytest.raises(RuntimeError, match="refuses"):
        libcrypto.Xts(bytes(64), encrypt=True, sources=[], targets=[])


@pytest.mark.parametrize(
    ("key", "source", "target"), [(32, 4096, 4096), (64, 8192, 4096)]
)
def test_a_short_key_or_target_is_refused(key, source, target):
    with pytest.raises(ValueError, match=f"a key of {key} bytes"):
        libcrypto.Xts(
            KEY[:key],
            encrypt=True,
            sources=blocks(bytearray(source)),
            targets=blocks(bytearray(target)),
        )


def test_a_piece_of_a_block_is_refused():
    short = [memoryview(bytearray(4095))]
    with pytest.raises(ValueError, match="1 blocks into 1"):
        libcrypto.Xts(KEY, encrypt=True, sources=short, targets=short)


@pytest.mark.parametrize("count", [-1, 2])
def test_more_blocks_than_there_is_room_for_are_refused(count):
    made = xts(bytearray(4096), bytearray(4096), encrypt=True)
    with pytest.raises(ValueError, match="where 1 have room"):
        made.run(0, count)
    made.close()
