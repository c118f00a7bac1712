"""Files of numpy.save, read without numpy."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tdxd.core.npy import read_npy
from tdxd.core.tensors import dtype_of
from tdxd.errors import DataError

NUMBERS = [
    "<f4",
    "<f8",
    "<i4",
    "|u1",
    "<i2",
    "|i1",
    "<c8",
    "<i8",
    "|b1",
    "<u2",
    "<c16",
    "<f2",
    "<u4",
    "<u8",
]


def saved(array, version=None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asanyarray(array), version=version)
    return file.getvalue()


@given(
    st.sampled_from(NUMBERS).flatmap(
        lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=0, max_dims=4))
    ),
    st.sampled_from([(1, 0), (2, 0), (3, 0)]),
)
def test_arrays_come_back(array, version):
    found = read_npy(saved(array, version), source="f")
    assert (found.dtype, found.shape) == (dtype_of(array), array.shape)
    assert found.content == array.tobytes()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "f: not a .npy file"),
        (b"\x89PNG" + bytes(20), "f: not a .npy file"),
        (saved(np.zeros(3))[:-1], "f: 23 bytes, but shape [3] needs 24"),
        (saved(np.zeros((2, 2), order="F")), "f: in Fortran order"),
        (saved(np.zeros(3, ">f4")), "f: elements of type '>f4'"),
        (saved(np.array(["a"])), "f: elements of type '<U1'"),
        (saved(np.zeros(2))[:8] + b"\xff\xff\0\0", "f: header of"),
        (b"\x93NUMPY\1\0\4\0((((", "f: its header cannot be read"),
        (b"\x93NUMPY\1\0\2\0[]", "f: its header says nothing"),
        (b"\x93NUMPY\1\0\2\0{}", "f: shape None is no list of sizes"),
    ],
)
def test_what_is_no_array_is_refused(data, text):
    with pytest.raises(DataError) as caught:
        read_npy(data, source="f")
    assert caught.value.message.startswith(text)


@given(st.binary(max_size=60))
def test_any_bytes_are_an_array_or_refused(data):
    with contextlib.suppress(DataError):
        read_npy(b"\x93NUMPY" + data, source="f")
