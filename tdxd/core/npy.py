"""Reads .npy files without numpy, which the owner's tools do not bring.

Source: numpy.lib.format, versions 1.0 to 3.0.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import struct

from tdxd.errors import DataError

__all__ = ["NpyArray", "read_npy"]

_MAGIC = b"\x93NUMPY"
_HINT = "save it with numpy.save, as an array of numbers in C order"
_MAX_HEADER_BYTES = 10_000
# numpy's type text → TensorFlow's DataType number. Source: types.proto.
_TYPES = {
    "<f4": 1,
    "<f8": 2,
    "<i4": 3,
    "|u1": 4,
    "<i2": 5,
    "|i1": 6,
    "<c8": 8,
    "<i8": 9,
    "|b1": 10,
    "<u2": 17,
    "<c16": 18,
    "<f2": 19,
    "<u4": 22,
    "<u8": 23,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NpyArray:
    """An array: DataType number, sizes, little-endian bytes in C order."""

    dtype: int
    shape: tuple[int, ...]
    content: bytes


def read_npy(data: bytes, *, source: str) -> NpyArray:
    """Read the content of a .npy file.

    Raises: DataError for anything that is not one whole array of a type that a tensor has.
    """
    header, begin = _header(data, source)
    shape, kind = header.get("shape"), header.get("descr")
    if not isinstance(shape, tuple) or not all(
        isinstance(one, int) and one >= 0 for one in shape
    ):
        raise DataError(f"{source}: shape {shape!r} is no list of sizes", hint=_HINT)
    if not isinstance(kind, str) or kind not in _TYPES:
        raise DataError(f"{source}: elements of type {kind!r}", hint=_HINT)
    if header.get("fortran_order") and len(shape) > 1:
        raise DataError(f"{source}: in Fortran order", hint=_HINT)
    content = data[begin:]
    want = math.prod(shape) * int(kind[2:])
    if len(content) != want:
        text = f"{source}: {len(content)} bytes, but shape {list(shape)} needs {want}"
        raise DataError(text)
    return NpyArray(dtype=_TYPES[kind], shape=shape, content=content)


def _header(data: bytes, source: str) -> tuple[dict[str, object], int]:
    """Return what the header says, and where the elements begin."""
    if not data.startswith(_MAGIC) or len(data) < 12:
        raise DataError(f"{source}: not a .npy file", hint=_HINT)
    form, begin = ("<H", 10) if data[6] == 1 else ("<I", 12)
    (size,) = struct.unpack_from(form, data, 8)
    end = begin + size
    if size > _MAX_HEADER_BYTES or end > len(data):
        raise DataError(f"{source}: header of {size} bytes", hint=_HINT)
    try:
        header = ast.literal_eval(data[begin:end].decode("utf-8").strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError) as exc:
        raise DataError(f"{source}: its header cannot be read", hint=_HINT) from exc
    if not isinstance(header, dict):
        raise DataError(f"{source}: its header says nothing", hint=_HINT)
    return header, end
