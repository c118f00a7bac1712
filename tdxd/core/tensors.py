"""Tensors between numpy and TensorFlow's TensorProto messages, without TensorFlow.

The messages are duck-typed (`TensorMessage`): whoever calls brings the class. This is the one
file of core that imports numpy, and the daemon does not import this file.

Source: tensorflow/core/framework/tensor.proto, tensor_shape.proto, types.proto; what to do with
short lists from Tensor::FromProto in tensorflow/core/framework/tensor.cc.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from tdxd.errors import DataError

__all__ = [
    "DT_STRING",
    "EXPANSION_LIMIT_BYTES",
    "MAX_RANK",
    "Array",
    "TensorMessage",
    "dtype_name",
    "dtype_of",
    "numpy_dtype",
    "read_tensor",
    "write_content",
    "write_values",
]

Array = npt.NDArray[Any]

MAX_RANK = 32
"""Numpy 1.26 has no more axes; TensorFlow itself allows 254."""

EXPANSION_LIMIT_BYTES = 64 << 20
"""How much more memory than its own length a message may make us allocate."""

_ELEMENTS_LIMIT = 1 << 40

DT_STRING = 7
_BFLOAT16 = 14


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """One element type: its name, its little-endian numpy type, its list field in the message.

    `how` says what the list holds: plain values, real and imaginary parts in turn, or the bits of
    a 16-bit float. `number` is the list field's number.
    """

    name: str
    numpy: str
    field: str
    number: int
    how: Literal["plain", "pairs", "bits", "bytes"] = "plain"


# Source: types.proto (the keys), tensor.proto (field names and numbers).
_KINDS: Mapping[int, _Kind] = {
    1: _Kind(name="float", numpy="<f4", field="float_val", number=5),
    2: _Kind(name="double", numpy="<f8", field="double_val", number=6),
    3: _Kind(name="int32", numpy="<i4", field="int_val", number=7),
    4: _Kind(name="uint8", numpy="|u1", field="int_val", number=7),
    5: _Kind(name="int16", numpy="<i2", field="int_val", number=7),
    6: _Kind(name="int8", numpy="|i1", field="int_val", number=7),
    7: _Kind(name="string", numpy="O", field="string_val", number=8, how="bytes"),
    8: _Kind(
        name="complex64", numpy="<c8", field="scomplex_val", number=9, how="pairs"
    ),
    9: _Kind(name="int64", numpy="<i8", field="int64_val", number=10),
    10: _Kind(name="bool", numpy="|b1", field="bool_val", number=11),
    14: _Kind(name="bfloat16", numpy="<u2", field="half_val", number=13, how="bits"),
    17: _Kind(name="uint16", numpy="<u2", field="int_val", number=7),
    18: _Kind(
        name="complex128", numpy="<c16", field="dcomplex_val", number=12, how="pairs"
    ),
    19: _Kind(name="half", numpy="<f2", field="half_val", number=13, how="bits"),
    22: _Kind(name="uint32", numpy="<u4", field="uint32_val", number=16),
    23: _Kind(name="uint64", numpy="<u8", field="uint64_val", number=17),
}
_FLOAT_FIELDS = frozenset(("float_val", "double_val", "scomplex_val", "dcomplex_val"))


class TensorMessage(Protocol):
    """What is used of a TensorProto; its `*_val` lists are reached by name."""

    dtype: int
    tensor_content: bytes

    @property
    def tensor_shape(self) -> Any:
        """Return the TensorShapeProto: `dim`, `unknown_rank`."""
        ...

    def Clear(self) -> None:  # noqa: N802 - protobuf's name
        """Empty the message."""
        ...

    def MergeFromString(self, serialized: bytes, /) -> int:  # noqa: N802 - protobuf's name
        """Add encoded fields."""
        ...


# --- element types ------------------------------------------------------------


def dtype_name(number: int) -> str:
    """Return TensorFlow's name of an element type, such as `float`; `type 99` if unknown."""
    kind = _KINDS.get(number)
    return kind.name if kind else f"type {number}"


def dtype_of(array: Array) -> int:
    """Return the DataType number of an array's elements; any text or object is a string.

    Raises: DataError for a type that no tensor has.
    """
    if array.dtype.kind in "SUO":
        return DT_STRING
    number = _numbers().get(array.dtype.newbyteorder("<"))
    if number is None:
        message = f"numpy type {array.dtype}: no tensor has this element type"
        raise DataError(message, hint="convert it first, for example to float32")
    return number


def numpy_dtype(number: int) -> np.dtype[Any]:
    """Return numpy's little-endian type for a DataType number; object for strings.

    Raises: DataError for a type that no tensor has, or that is not installed.
    """
    kind = _KINDS.get(number)
    if kind is None:
        raise DataError(f"tensor of element type {number}: not supported")
    if number != _BFLOAT16:
        return np.dtype(kind.numpy)
    found = _bfloat16()
    if found is None:  # pragma: no cover - depends on what is installed
        raise DataError("bfloat16 tensor: not supported here", hint="install ml_dtypes")
    return found


@functools.cache
def _numbers() -> dict[np.dtype[Any], int]:
    made = {
        np.dtype(kind.numpy): number
        for number, kind in _KINDS.items()
        if number not in (DT_STRING, _BFLOAT16)
    }
    bfloat16 = _bfloat16()
    if bfloat16 is not None:  # pragma: no branch
        made[bfloat16] = _BFLOAT16
    return made


@functools.cache
def _bfloat16() -> np.dtype[Any] | None:
    """Return numpy's bfloat16, which ml_dtypes adds where it is installed."""
    try:
        import ml_dtypes
    except ImportError:  # pragma: no cover - depends on what is installed
        return None
    made: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return made


# --- writing ------------------------------------------------------------------


def write_content(message: TensorMessage, array: Array) -> None:
    """Fill a TensorProto compactly: raw little-endian bytes, or `string_val` for text.

    This is what a request wants: one copy, whatever the size.

    Raises: DataError for an element type that no tensor has.
    """
    number = _write_head(message, array)
    if number == DT_STRING:
        _strings(message, array)
        return
    little = array.dtype.newbyteorder("<")
    message.tensor_content = np.ascontiguousarray(array, dtype=little).tobytes()


def write_values(message: TensorMessage, array: Array) -> None:
    """Fill a TensorProto's `*_val` list, as TensorFlow Serving fills its responses.

    Raises: DataError for an element type that no tensor has.
    Source: Tensor::AsProtoField in tensorflow/core/framework/tensor.cc.
    """
    number = _write_head(message, array)
    kind = _KINDS[number]
    if kind.how == "bytes":
        _strings(message, array)
        return
    flat = np.ascontiguousarray(array).reshape(-1)
    if kind.field in _FLOAT_FIELDS:
        # A packed list of floats is their bytes: 100 times faster than appending.
        data = flat.astype(np.dtype(kind.numpy), copy=False).tobytes()
        if data:
            tag = _varint(kind.number << 3 | 2)
            message.MergeFromString(tag + _varint(len(data)) + data)
        return
    if kind.how == "bits":
        flat = flat.view(np.uint16)
    getattr(message, kind.field).extend(flat.tolist())


def _write_head(message: TensorMessage, array: Array) -> int:
    number = dtype_of(array)
    message.Clear()
    message.dtype = number
    message.tensor_shape.SetInParent()  # a scalar has a shape, too: no dimensions
    for size in array.shape:
        message.tensor_shape.dim.add().size = size
    return number


def _strings(message: Any, array: Array) -> None:
    message.string_val.extend(_as_bytes(item) for item in array.reshape(-1).tolist())


def _as_bytes(item: object) -> bytes:
    if isinstance(item, bytes):
        return item
    if isinstance(item, str):
        return item.encode()
    message = f"string tensor with an element of type {type(item).__name__}"
    raise DataError(message, hint="every element must be bytes or str")


def _varint(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)


# --- reading ------------------------------------------------------------------


def read_tensor(
    message: TensorMessage, *, expansion_limit_bytes: int = EXPANSION_LIMIT_BYTES
) -> Array:
    """Read a TensorProto into an array; bytes objects in an object array for strings.

    The array may share the message's memory and be read-only. A `*_val` list that is too short
    repeats its last value, an empty one means zeros, as in TensorFlow; one that is too long is
    refused, though TensorFlow drops the rest.

    Raises: DataError for anything that is not one whole tensor, for an unknown element type, and
    for a list that would grow by more than `expansion_limit_bytes`.
    """
    numpy_type = numpy_dtype(message.dtype)
    kind = _KINDS[message.dtype]
    shape = _read_shape(message)
    count = math.prod(shape)
    content = message.tensor_content
    if content and kind.how == "bytes":
        return _object_array(_split_strings(content, count), shape)
    if content:
        return _from_content(content, numpy_type, shape)
    values = getattr(message, kind.field)
    width = 2 if kind.how == "pairs" else 1
    if len(values) > count * width:
        text = f"tensor of shape {list(shape)} with {len(values)} values: too many"
        raise DataError(text)
    missing = (count - len(values) // width) * numpy_type.itemsize
    if missing > expansion_limit_bytes:
        text = f"tensor of shape {list(shape)} with only {len(values)} values"
        raise DataError(text, hint="send every value, or tensor_content")
    if kind.how == "bytes":
        return _object_array(_repeat_last(values, count, b""), shape)
    flat = _read_values(values, kind, numpy_type)
    return _fill(flat, count).reshape(shape)


def _read_shape(message: TensorMessage) -> tuple[int, ...]:
    if message.tensor_shape.unknown_rank:
        raise DataError("tensor of unknown rank")
    shape = tuple(dim.size for dim in message.tensor_shape.dim)
    if len(shape) > MAX_RANK:
        text = f"tensor with {len(shape)} dimensions, at most {MAX_RANK} allowed"
        raise DataError(text)
    # Sizes of zero hide no overflow: numpy refuses (0, 2**62) with an error of its own.
    too_many = math.prod(max(size, 1) for size in shape) > _ELEMENTS_LIMIT
    if too_many or any(size < 0 for size in shape):
        raise DataError(f"tensor of shape {list(shape)}: impossible")
    return shape


def _from_content(
    content: bytes, numpy_type: np.dtype[Any], shape: tuple[int, ...]
) -> Array:
    want = math.prod(shape) * numpy_type.itemsize
    if len(content) != want:
        text = f"tensor of shape {list(shape)} and type {numpy_type}"
        raise DataError(f"{text}: {len(content)} bytes, expected {want}")
    if numpy_type.kind == "b":
        # Other byte values than 0 and 1 would be booleans that equal neither.
        flags: Array = np.frombuffer(content, np.uint8).reshape(shape) != 0
        return flags
    return np.frombuffer(content, numpy_type).reshape(shape)


def _read_values(values: Any, kind: _Kind, numpy_type: np.dtype[Any]) -> Array:
    if kind.how == "pairs":
        if len(values) % 2:
            raise DataError(f"{kind.name} tensor with half a value")
        part = np.dtype(f"<f{numpy_type.itemsize // 2}")
        return np.array(values, part).view(numpy_type)
    wide = np.array(values, None if len(values) else np.int64)
    raw = np.dtype(np.uint16) if kind.how == "bits" else numpy_type
    if raw.kind in "iu" and wide.size:
        bounds = np.iinfo(raw)
        if int(wide.min()) < bounds.min or int(wide.max()) > bounds.max:
            raise DataError(f"{kind.name} tensor with a value outside its type")
    narrow = wide.astype(raw)
    return narrow.view(numpy_type) if kind.how == "bits" else narrow


def _fill(flat: Array, count: int) -> Array:
    if flat.size == count:
        return flat
    whole = np.zeros(count, flat.dtype)
    if flat.size:
        whole[: flat.size] = flat
        whole[flat.size :] = flat[-1]
    return whole


def _repeat_last(values: Sequence[bytes], count: int, empty: bytes) -> list[bytes]:
    last = values[-1] if values else empty
    return [*values, *[last] * (count - len(values))]


def _object_array(items: list[bytes], shape: tuple[int, ...]) -> Array:
    made = np.empty(len(items), dtype=object)
    made[:] = items
    return made.reshape(shape)


def _split_strings(content: bytes, count: int) -> list[bytes]:
    """Split string tensor content: all lengths as varints, then all bytes.

    Source: port::DecodeStringList in tensorflow/core/platform/tensor_coding.cc.
    """
    bad = DataError(f"string tensor content is not {count} strings")
    if count > len(content):
        raise bad
    lengths: list[int] = []
    offset = 0
    for _ in range(count):
        value = shift = 0
        while True:
            if offset >= len(content) or shift > 28:
                raise bad
            byte = content[offset]
            offset += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        lengths.append(value)
    if offset + sum(lengths) != len(content):
        raise bad
    made: list[bytes] = []
    for length in lengths:
        made.append(content[offset : offset + length])
        offset += length
    return made
