"""Predict requests of the REST API: JSON to tensors.

Source of forms and texts: tensorflow_serving/util/json_tensor.cc.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import grpc
import numpy as np

from tdxd.core.tensors import DT_STRING, dtype_name, numpy_dtype
from tdxd.errors import DataError
from tdxd.model_server.failure import RpcFailure
from tdxd.model_server.json_values import (
    base64_bytes,
    is_base64,
    json_type,
    lossy_refusal,
    refusal,
    shown,
)
from tdxd.model_server.registry import Array

__all__ = ["read_tensors"]

_MAX_DEPTH = 64
_BOOL = 10
_WHOLE_BITS: Mapping[int, int] = {1: 24, 2: 53, 14: 8, 19: 11}
"""How many bits of a whole number each type of floats holds exactly."""


def read_tensors(
    document: Mapping[str, Any], kinds: Mapping[str, int]
) -> tuple[Literal["row", "column"], dict[str, Array]]:
    """Return a Predict request's form and its inputs; `kinds` are the signature's element types.

    Raises: RpcFailure.
    """
    if "instances" in document and "inputs" in document:
        raise refusal(
            f"JSON Value: {shown(document)} Not formatted correctly expecting only one of "
            "'inputs' or 'instances' keys to exist "
        )
    if "instances" in document:
        rows = document["instances"]
        if not isinstance(rows, list):
            text = "Excepting 'instances' to be an list/array"
            raise refusal(f"JSON Value: {shown(document)} {text}")
        if not rows:
            raise refusal(
                f"JSON Value: {shown(document)} No values in 'instances' array"
            )
        return "row", _from_rows(rows, kinds)
    if "inputs" in document:
        return "column", _from_columns(document["inputs"], kinds)
    raise refusal("Missing 'inputs' or 'instances' key")


def _from_rows(rows: list[Any], kinds: Mapping[str, int]) -> dict[str, Array]:
    if not isinstance(rows[0], dict) and len(kinds) > 1:
        raise refusal(
            "instances is a plain list, but expecting list of objects as multiple input "
            "tensors required as per tensorinfo_map"
        )
    named = _is_named(rows[0])
    for number, row in enumerate(rows):
        if _is_named(row) is named:
            continue
        what = "object but got list" if named else "value/list but got object"
        raise refusal(f"Expecting {what} at item {number} of input list")
    if not named:
        name = next(iter(kinds))
        return {name: _column(rows, kinds[name], key="")}
    wanted = sorted(kinds)
    for number, row in enumerate(rows):
        for name in row:
            if name not in kinds:
                text = f"JSON object: does not have named input: {name}"
                raise _element_refusal(number, name, text)
        if len(row) != len(wanted):
            raise refusal(
                f"Failed to process element: {number} of 'instances' list. JSON object: "
                f"{shown(row)} keys must be equal to: {','.join(wanted)}"
            )
    return {
        name: _column([row[name] for row in rows], kinds[name], key=name)
        for name in wanted
    }


def _column(values: list[Any], kind: int, *, key: str) -> Array:
    """Return one input of all rows; what is wrong is told of the first row that has it."""
    try:
        return _array(values, kind)
    except RpcFailure as exc:
        wrong = _wrong_row(values, kind, key)
        raise wrong or exc from exc


def _wrong_row(values: list[Any], kind: int, key: str) -> RpcFailure | None:
    first: Array | None = None
    for number, value in enumerate(values):
        try:
            one = _array(value, kind)
        except RpcFailure as exc:
            return _element_refusal(number, key, exc.text, exc.code.name)
        if first is None:
            first = one
        elif first.size != one.size:
            text = f"Expecting tensor size: {first.size} but got: {one.size}"
            return _element_refusal(number, key, text)
        elif first.shape != one.shape:
            shapes = f"{_shape(first)} but got: {_shape(one)}"
            return _element_refusal(number, key, f"Expecting shape {shapes}")
    return None


def _from_columns(value: Any, kinds: Mapping[str, int]) -> dict[str, Array]:
    if _is_named(value):
        for name in kinds:
            if name not in value:
                raise refusal(f"Missing named input: {name} in 'inputs' object.")
        return {name: _array(value[name], kind) for name, kind in kinds.items()}
    if len(kinds) > 1:
        raise refusal(
            "inputs is a plain value/list, but expecting an object as multiple input "
            "tensors required as per tensorinfo_map"
        )
    ((name, kind),) = kinds.items()
    return {name: _array(value, kind)}


def _array(value: Any, kind: int) -> Array:
    """Return a value, or lists of lists of values, as an array; its first items give its shape."""
    shape: list[int] = []
    first = value
    while isinstance(first, list):
        shape.append(len(first))
        if len(shape) > _MAX_DEPTH:
            raise refusal(f"a tensor of more than {_MAX_DEPTH} dimensions")
        if not first:
            break
        first = first[0]
    items: Sequence[Any] = [value]
    for level, size in enumerate(shape):
        for item in items:
            if not isinstance(item, list):
                raise refusal(
                    f"JSON Value: {shown(item)} found at incorrect level: {level + 1} in "
                    f"the JSON DOM. Expected at level: {len(shape)}"
                )
            if len(item) != size:
                raise refusal(
                    f"Encountered list at unexpected size: {len(item)} at level: {level} "
                    f"expected size: {size}"
                )
        items = list(itertools.chain.from_iterable(items))
    if list in set(map(type, items)):
        rank = len(shape)
        raise refusal(f"Encountered list at unexpected level: {rank} expected < {rank}")
    return _leaves(items, kind).reshape(shape)


def _leaves(items: Sequence[Any], kind: int) -> Array:
    found = set(map(type, items))
    if kind == DT_STRING:
        made = np.empty(len(items), dtype=object)
        made[:] = [_text(item) for item in items]
        return made
    try:
        numpy_type = numpy_dtype(kind)
    except DataError:
        numpy_type = np.dtype(np.complex64)  # no number of JSON is one of these either
    if numpy_type.kind == "c":
        one = f"{shown(items[0]) if items else ''} to type: {dtype_name(kind)}"
        text = f"Conversion of JSON Value: {one}"
        raise RpcFailure(grpc.StatusCode.UNIMPLEMENTED, text)
    allowed: set[type] = {bool} if kind == _BOOL else {int}
    if kind in _WHOLE_BITS:
        allowed = {int, float}
    if not found <= allowed:
        wrong = next(item for item in items if type(item) not in allowed)
        raise _type_refusal(wrong, kind)
    if kind in _WHOLE_BITS:
        return _floats(items, kind, numpy_type, whole=int in found)
    if kind != _BOOL and items:
        bounds = np.iinfo(numpy_type)
        for extreme in (min(items), max(items)):
            if not bounds.min <= extreme <= bounds.max:
                raise _type_refusal(extreme, kind)
    return np.array(items, numpy_type)


def _floats(
    items: Sequence[Any], kind: int, numpy_type: np.dtype[Any], *, whole: bool
) -> Array:
    largest = (1 << _WHOLE_BITS[kind]) - 1
    if whole:
        for item in items:
            if type(item) is int and abs(item) > largest:
                raise lossy_refusal(item, dtype_name(kind))
    wide = np.array(items, np.float64)
    with np.errstate(over="ignore"):
        made: Array = wide.astype(numpy_type)
    overflown = np.isfinite(wide) & ~np.isfinite(made.astype(np.float64))
    if overflown.any():
        raise lossy_refusal(items[int(overflown.argmax())], dtype_name(kind))
    return made


def _text(item: Any) -> bytes:
    if isinstance(item, str):
        return item.encode("utf-8", "surrogatepass")
    if isinstance(item, dict):
        return base64_bytes(item)
    raise _type_refusal(item, DT_STRING)


def _is_named(value: Any) -> bool:
    return isinstance(value, dict) and not is_base64(value)


def _shape(array: Array) -> str:
    return "[" + ",".join(map(str, array.shape)) + "]"


def _type_refusal(value: Any, kind: int) -> RpcFailure:
    return refusal(
        f"JSON Value: {shown(value)} Type: {json_type(value)} is not of expected type: "
        f"{dtype_name(kind)}"
    )


def _element_refusal(
    number: int, key: str, text: str, code: str = "INVALID_ARGUMENT"
) -> RpcFailure:
    named = f" key: {key}" if key else ""
    return refusal(
        f"Failed to process element: {number}{named} of 'instances' list. "
        f"Error: {code}: {text}"
    )
