"""TFRecord files against published checksums and against damage."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core.tfrecord import crc32c, read_records, write_records
from tdxd.errors import DataError

# RFC 3720, B.4: the checksums of these bytes, there in the order in which they are sent.
RFC_3720 = [
    (bytes(32), "aa36918a"),
    (b"\xff" * 32, "43aba862"),
    (bytes(range(32)), "4e79dd46"),
    (bytes(range(31, -1, -1)), "5cdb3f11"),
]
# As tf.io.TFRecordWriter of TensorFlow 2.21 writes the records b"" and b"tdxd".
WRITTEN = bytes.fromhex(
    "000000000000000029039807d8ea82a204000000000000004245520474647864701f643c"
)


@pytest.mark.parametrize(("data", "sent"), RFC_3720)
def test_the_checksums_of_the_standard(data, sent):
    assert crc32c(data).to_bytes(4, "little").hex() == sent


def test_the_check_value_of_the_catalogue():
    assert crc32c(b"123456789") == 0xE3069283


def test_what_tensorflow_writes():
    assert write_records([b"", b"tdxd"]) == WRITTEN
    assert list(read_records(WRITTEN, source="f")) == [b"", b"tdxd"]


@given(st.lists(st.binary(max_size=80), max_size=5))
def test_records_come_back(records):
    assert list(read_records(write_records(records), source="f")) == records


@given(st.binary(max_size=40), st.data())
def test_a_changed_bit_is_never_taken_for_a_record(record, data):
    whole = bytearray(write_records([record]))
    where = data.draw(st.integers(0, len(whole) * 8 - 1))
    whole[where // 8] ^= 1 << where % 8
    with pytest.raises(DataError, match=r"f: (cut|wrong checksum)"):
        list(read_records(bytes(whole), source="f"))


@given(st.binary(max_size=40), st.data())
def test_a_cut_file_is_refused(record, data):
    whole = write_records([record])
    end = data.draw(st.integers(1, len(whole) - 1))
    with pytest.raises(DataError, match="f: cut"):
        list(read_records(whole[:end], source="f"))
