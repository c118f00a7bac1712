"""Tensors: round trips, TensorFlow's rules for short lists, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core import tensors
from tdxd.errors import DataError, ServeError
from tdxd.host import tf_messages

try:
    TensorProto: Any = type(tf_messages.predict().PredictRequest().inputs["x"])
except ServeError as exc:
    pytest.skip(f"no TensorProto class: {exc.message}", allow_module_level=True)

NUMERIC = {
    1: "<f4",
    2: "<f8",
    3: "<i4",
    4: "u1",
    5: "<i2",
    6: "i1",
    8: "<c8",
    9: "<i8",
    10: "?",
    17: "<u2",
    18: "<c16",
    19: "<f2",
    22: "<u4",
    23: "<u8",
}
WRITERS = [tensors.write_content, tensors.write_values]
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


def over_the_wire(write, array):
    message = TensorProto()
    write(message, array)
    return TensorProto.FromString(message.SerializeToString())


@pytest.mark.parametrize("write", WRITERS)
@given(number=st.sampled_from(sorted(NUMERIC)), shape=shapes, data=st.data())
def test_numbers_survive_bit_for_bit(write, number, shape, data):
    dtype = np.dtype(NUMERIC[number])
    size = math.prod(shape) * dtype.itemsize
    raw = data.draw(st.binary(min_size=size, max_size=size))
    if dtype.kind == "b":
        raw = bytes(byte & 1 for byte in raw)
    array = np.frombuffer(raw, dtype).reshape(shape)
    message = over_the_wire(write, array)
    back = tensors.read_tensor(message)
    assert message.dtype == number
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize("write", WRITERS)
@given(items=st.lists(st.binary(max_size=9), max_size=6))
def test_strings_survive(write, items):
    array = np.empty(len(items), dtype=object)
    array[:] = items
    back = tensors.read_tensor(over_the_wire(write, array))
    assert back.tolist() == items


@pytest.mark.parametrize("write", WRITERS)
def test_text_is_written_as_utf8_and_a_scalar_has_a_shape(write):
    message = over_the_wire(write, np.array("grün"))
    assert message.HasField("tensor_shape")
    assert tensors.read_tensor(message).item() == "grün".encode()


@pytest.mark.parametrize("write", WRITERS)
def test_bfloat16_survives(write):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.array([1.5, -2.0, 3e38], ml_dtypes.bfloat16)
    message = over_the_wire(write, array)
    assert message.dtype == 14
    assert tensors.read_tensor(message).tobytes() == array.tobytes()


@pytest.mark.parametrize("write", WRITERS)
def test_byte_order_and_strides_do_not_matter(write):
    array = np.arange(12, dtype=">i4").reshape(3, 4).T
    back = tensors.read_tensor(over_the_wire(write, array))
    assert back.tolist() == array.tolist()


def test_writing_replaces_what_was_there():
    message = TensorProto(dtype=3, int_val=[1, 2, 3])
    tensors.write_values(message, np.array([7.0], np.float32))
    assert message.float_val == [7.0]
    assert not message.int_val


def shaped(dims, **fields):
    message = TensorProto(**fields)
    message.tensor_shape.SetInParent()
    for size in dims:
        message.tensor_shape.dim.add().size = size
    return message


@pytest.mark.parametrize(
    ("message", "want"),
    [
        (shaped([4], dtype=1, float_val=[1, 2]), [1, 2, 2, 2]),
        (shaped([2, 2], dtype=3, int_val=[7]), [[7, 7], [7, 7]]),
        (shaped([3], dtype=9), [0, 0, 0]),
        (shaped([3], dtype=10, bool_val=[True]), [True, True, True]),
        (shaped([2], dtype=19, half_val=[0x3C00]), [1.0, 1.0]),
        (shaped([2], dtype=8, scomplex_val=[1, 2]), [1 + 2j, 1 + 2j]),
        (shaped([3], dtype=7, string_val=[b"a", b"b"]), [b"a", b"b", b"b"]),
        (shaped([2], dtype=7), [b"", b""]),
        (shaped([0, 3], dtype=1), []),
        (shaped([2], dtype=10, tensor_content=b"\x02\x00"), [True, False]),
        (shaped([2], dtype=7, tensor_content=b"\x01\x02abc"), [b"a", b"bc"]),
        (
            shaped([1], dtype=7, tensor_content=b"\x80\x01" + b"z" * 128),
            [b"z" * 128],
        ),
        (shaped([2], dtype=23, uint64_val=[2**64 - 1, 0]), [2**64 - 1, 0]),
    ],
)
def test_reading_follows_tensorflow(message, want):
    assert tensors.read_tensor(message).tolist() == want


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (shaped([1], dtype=0), "element type 0: not supported"),
        (shaped([1], dtype=20), "element type 20: not supported"),
        (shaped([-1], dtype=1), "shape [-1]: impossible"),
        (shaped([0, 2**62], dtype=1), "impossible"),
        (shaped([2**62, 2**62], dtype=1), "impossible"),
        (shaped([1] * 33, dtype=1), "33 dimensions, at most 32 allowed"),
        (shaped([2], dtype=1, tensor_content=b"1234567"), "7 bytes, expected 8"),
        (shaped([0], dtype=1, tensor_content=b"1234"), "4 bytes, expected 0"),
        (shaped([1], dtype=3, int_val=[1, 2]), "2 values: too many"),
        (shaped([1], dtype=4, int_val=[256]), "uint8 tensor with a value outside"),
        (shaped([1], dtype=19, half_val=[-1]), "half tensor with a value outside"),
        (shaped([2], dtype=8, scomplex_val=[1, 2, 3]), "half a value"),
        (shaped([2**30], dtype=1, float_val=[1]), "with only 1 values"),
        (shaped([2**30], dtype=7, string_val=[b"x"]), "with only 1 values"),
        (shaped([2], dtype=7, tensor_content=b"\x01"), "is not 2 strings"),
        (shaped([1], dtype=7, tensor_content=b"\x05abc"), "is not 1 strings"),
        (shaped([1], dtype=7, tensor_content=b"\x80"), "is not 1 strings"),
        (shaped([1], dtype=7, tensor_content=b"\xff" * 9), "is not 1 strings"),
    ],
)
def test_what_is_no_tensor_is_refused(message, text):
    with pytest.raises(DataError) as caught:
        tensors.read_tensor(message)
    assert text in caught.value.message


def test_unknown_rank_is_refused():
    message = TensorProto(dtype=1, float_val=[1])
    message.tensor_shape.unknown_rank = True
    with pytest.raises(DataError, match="unknown rank"):
        tensors.read_tensor(message)


def test_a_short_list_grows_up_to_the_limit():
    message = shaped([256], dtype=1, float_val=[1])
    whole = tensors.read_tensor(message, expansion_limit_bytes=1020)
    assert whole.sum() == 256
    with pytest.raises(DataError):
        tensors.read_tensor(message, expansion_limit_bytes=1019)


@given(st.binary(max_size=80))
def test_any_bytes_give_an_array_or_a_data_error(data):
    message = TensorProto()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return
    try:
        array = tensors.read_tensor(message)
    except DataError:
        return
    assert array.nbytes <= tensors.EXPANSION_LIMIT_BYTES + 16 * len(data)


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.array(["2020-01-01"], "M8[D]"), "no tensor has this element type"),
        (np.array([1, None], object), "element of type int"),
    ],
)
def test_arrays_that_are_no_tensor_are_refused(array, text):
    with pytest.raises(DataError, match=text):
        tensors.write_content(TensorProto(), array)


def test_names_of_element_types():
    assert tensors.dtype_name(1) == "float"
    assert tensors.dtype_name(99) == "type 99"


def test_the_table_agrees_with_the_message():
    by_name = TensorProto.DESCRIPTOR.fields_by_name
    for kind in tensors._KINDS.values():
        assert by_name[kind.field].number == kind.number
    for name in tensors._FLOAT_FIELDS:
        assert by_name[name].is_packed
