"""What a model says of its inputs and outputs, and whether arrays fit that."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tdxd.core.tensors import DT_STRING, dtype_name, dtype_of, numpy_dtype
from tdxd.errors import DataError, UsageError

__all__ = [
    "Shape",
    "TensorSpec",
    "check_inputs",
    "input_specs",
    "output_specs",
    "random_array",
]

Array = npt.NDArray[Any]
Shape = tuple[int | None, ...]
"""Sizes of a tensor; None where any size will do."""

_MAX_RANDOM_ELEMENTS = 1 << 26


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One input or output: DataType number, and shape (None: the model does not say)."""

    name: str
    dtype: int
    shape: Shape | None

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)} {shape_text(self.shape)}"


def shape_text(shape: Iterable[int | None] | None) -> str:
    """Return a shape as `[?, 224, 224, 3]`."""
    if shape is None:
        return "of unknown shape"
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


def input_specs(signature: Any) -> dict[str, TensorSpec]:
    """Return the inputs of a SignatureDef message by name, sorted."""
    return _specs(signature.inputs)


def output_specs(signature: Any) -> dict[str, TensorSpec]:
    """Return the outputs of a SignatureDef message by name, sorted."""
    return _specs(signature.outputs)


def _specs(infos: Any) -> dict[str, TensorSpec]:
    made = {}
    for name in sorted(infos):
        info, shape = infos[name], None
        if info.HasField("tensor_shape") and not info.tensor_shape.unknown_rank:
            sizes = (one.size for one in info.tensor_shape.dim)
            shape = tuple(size if size >= 0 else None for size in sizes)
        made[name] = TensorSpec(name=name, dtype=info.dtype, shape=shape)
    return made


def check_inputs(arrays: Mapping[str, Array], signature: Any) -> None:
    """Compare named arrays with a SignatureDef message: names, types, shapes.

    Raises: DataError for the first that does not fit, with what would.
    """
    specs = input_specs(signature)
    for name, array in arrays.items():
        if name not in specs:
            raise DataError(
                f"no input {name!r} in the signature", hint=f"it has: {_list(specs)}"
            )
        _check_type(array, specs[name])
        _check_shape(array, specs[name])
    # An input with a default may be left out. Source: SignatureDef.defaults, TensorFlow 2.14.
    optional = set(getattr(signature, "defaults", ()))
    missing = [one for one in specs if one not in arrays and one not in optional]
    if missing:
        text = f"input {missing[0]} ({specs[missing[0]]}) is not given"
        hint = f"the signature wants: {_list(specs)}"
        raise DataError(text, hint=hint)


def _list(specs: Mapping[str, TensorSpec]) -> str:
    return ", ".join(specs) or "nothing"


def _check_type(array: Array, spec: TensorSpec) -> None:
    number = dtype_of(array)
    if number == spec.dtype:
        return
    text = f"input {spec.name}: elements of type {dtype_name(number)}; the model takes {spec}"
    if DT_STRING in (number, spec.dtype):
        raise DataError(text, hint="text and numbers are not each other")
    want = numpy_dtype(spec.dtype)
    raise DataError(text, hint=f"convert it before: array.astype('{want.name}')")


def _check_shape(array: Array, spec: TensorSpec) -> None:
    if spec.shape is None or _fits(array.shape, spec.shape):
        return
    given = shape_text(array.shape)
    text = f"input {spec.name}: shape {given}; the model takes {spec}"
    hint = "compare with the model's signature: tdx-infer show"
    if _fits(array.shape, spec.shape[1:]):
        hint = (
            "the first axis counts the examples, also if there is one: array[None, ...]"
        )
    raise DataError(text, hint=hint)


def _fits(given: tuple[int, ...], want: Shape) -> bool:
    return len(given) == len(want) and all(
        size is None or size == have for have, size in zip(given, want, strict=True)
    )


def random_array(spec: TensorSpec, *, rows: int, shape: Shape | None) -> Array:
    """Make an input of random values: bytes 0 to 255 as numbers, as pixels would be.

    `shape` fills what the model leaves open; an open first axis is `rows` long.

    Raises: UsageError if a size stays open; DataError for what has no random value.
    """
    sizes = _whole_shape(spec, rows, shape)
    count = int(np.prod(sizes, dtype=object)) if sizes else 1
    if count > _MAX_RANDOM_ELEMENTS:
        text = f"input {spec.name}: shape {shape_text(sizes)} is too much to make up"
        raise UsageError(text, hint="give the input by --input")
    random = np.random.default_rng(0).integers(0, 256, sizes, np.uint8)
    if spec.dtype == DT_STRING:
        text = f"input {spec.name}: text is not made up"
        raise DataError(text, hint="give the input by --input")
    want = numpy_dtype(spec.dtype)
    if want.kind == "b":
        random %= 2
    elif want.name == "int8":
        random //= 2
    made: Array = random.astype(want)
    return made


def _whole_shape(spec: TensorSpec, rows: int, shape: Shape | None) -> tuple[int, ...]:
    said = spec.shape if shape is None else shape
    if (
        shape is not None
        and spec.shape is not None
        and not (
            len(shape) == len(spec.shape)
            and all(
                want is None or size in (None, want)
                for size, want in zip(shape, spec.shape, strict=True)
            )
        )
    ):
        text = f"shape {shape_text(shape)} of {spec.name}: the model takes {spec}"
        raise UsageError(text, hint="see tdx-infer show")
    if said and said[0] is None:
        said = (rows, *said[1:])
    sizes = tuple(size for size in said or () if size is not None)
    if said is None or len(sizes) != len(said):
        text = f"input {spec.name} ({spec}): the model leaves sizes open"
        raise UsageError(text, hint=f"--shape {spec.name}=1,224,224,3 says them")
    return sizes
