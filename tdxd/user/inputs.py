"""Input tensors from .npy files, JSON and images, fitted to what a signature says."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tdxd.core.tensors import MAX_RANK, dtype_name, numpy_dtype
from tdxd.errors import DataError, HostError, UsageError
from tdxd.user.image_options import SUFFIXES, ImageOptions
from tdxd.user.signature import input_specs

__all__ = [
    "Array",
    "as_batch",
    "json_value",
    "name_inputs",
    "read_input",
    "read_inputs",
    "type_name",
]

Array = npt.NDArray[Any]

# Kinds of numpy types: what a JSON value may look like for each kind of element.
_FITTING = {"f": "fiu", "i": "iu", "u": "iu", "b": "b", "c": "fiuc", "V": "fiu"}


def read_inputs(
    arguments: Sequence[str],
    images: Sequence[str],
    stdin: Any,
    options: ImageOptions | None = None,
) -> dict[str | None, Any]:
    """Read all `--input` and all `--image` arguments.

    Returns what `read_input` does, and `Images` where image files are named, which may be several
    for one input: files of `--image`, and those of `--input` that end as images do.

    Raises: UsageError, HostError, DataError.
    """
    given: dict[str | None, Any] = {}
    pictures: dict[str | None, list[str]] = {}
    for argument in arguments:
        name, path = _split(argument)
        if path.lower().endswith(SUFFIXES):
            pictures.setdefault(name, []).append(path)
            continue
        for one, value in read_input(argument, stdin).items():
            if one in given:
                raise _twice(one)
            given[one] = value
    for argument in images:
        name, path = _split(argument)
        pictures.setdefault(name, []).append(path)
    for name, paths in pictures.items():
        from tdxd.user.images import Images

        if name in given:
            raise _twice(name)
        given[name] = Images(paths=tuple(paths), options=options or ImageOptions())
    return given


def _twice(name: str | None) -> UsageError:
    return UsageError(
        f"input {'without a name' if name is None else name} is given twice"
    )


def _split(argument: str) -> tuple[str | None, str]:
    """Split `[NAME=]FILE`."""
    name, separator, path = argument.partition("=")
    if not separator:
        name, path = "", argument
    if not path:
        raise UsageError(f"--input {argument!r}: no file", hint="NAME=FILE.npy")
    return name or None, path


def read_input(argument: str, stdin: Any) -> dict[str | None, Any]:
    """Read one `--input`: `[NAME=]FILE.npy`, or a JSON file, or `-` for JSON on stdin.

    Returns arrays (.npy) or plain values (JSON) by input name; None stands for the one input
    of a model that has one. A JSON object holds an input for each of its keys.

    Raises: UsageError, HostError, DataError.
    """
    name, path = _split(argument)
    if path.endswith(".npy"):
        return {name: _read_npy(path)}
    value = _read_json(path, stdin)
    if isinstance(value, dict) and name is None and "b64" not in value:
        return dict(value)
    return {name: value}


def _read_npy(path: str) -> Array:
    try:
        with open(path, "rb") as file:
            array: Array = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as exc:
        raise HostError.of("read", path, exc) from exc
    except (ValueError, EOFError) as exc:
        raise DataError(f"{path}: not a .npy file of plain values: {exc}") from exc
    return array


def _read_json(path: str, stdin: Any) -> Any:
    try:
        if path == "-":
            return json.load(stdin)
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as exc:
        raise HostError.of("read", path, exc) from exc
    except (ValueError, RecursionError) as exc:
        hint = "inputs are .npy files, or JSON: nested lists by input name"
        raise DataError(f"{path}: not JSON: {exc}", hint=hint) from exc


def name_inputs(
    given: Mapping[str | None, Any], signature: Any | None
) -> dict[str, Array]:
    """Return arrays by input name: names the unnamed one, gives JSON values their types.

    `signature` is a SignatureDef message; it may be None if every input is a named array.

    Raises: UsageError, DataError.
    """
    named: dict[str, Array] = {}
    for name, value in given.items():
        if name is None:
            name = _only_input(signature)  # noqa: PLW2901 - the same input, now with a name
        if name in named:
            raise _twice(name)
        if isinstance(value, np.ndarray):
            named[name] = value
        else:
            assert signature is not None
            named[name] = _made(name, value, signature)
    return named


def _only_input(signature: Any | None) -> str:
    assert signature is not None
    names = sorted(signature.inputs)
    if len(names) != 1:
        text = f"the signature has {len(names)} inputs ({', '.join(names)})"
        raise UsageError(text, hint="name each: --input NAME=FILE.npy")
    only: str = names[0]
    return only


def _made(name: str, value: Any, signature: Any) -> Array:
    """Make an array of a JSON value or of images, as the signature wants that input."""
    specs = input_specs(signature)
    if name not in specs:
        known = ", ".join(specs)
        raise DataError(f"no input {name!r} in the signature", hint=f"it has: {known}")
    if hasattr(value, "array"):
        array: Array = value.array(specs[name])
        return array
    return _typed(name, _with_bytes(name, value), specs[name].dtype)


def _with_bytes(name: str, value: Any, depth: int = 0) -> Any:
    """Replace each `{"b64": …}`, which is how JSON says bytes; no tensor is deeper."""
    if isinstance(value, list) and depth < MAX_RANK:
        return [_with_bytes(name, one, depth + 1) for one in value]
    if not isinstance(value, dict):
        return value
    try:
        if value.keys() != {"b64"}:
            raise ValueError
        return base64.b64decode(value["b64"], validate=True)
    except (ValueError, TypeError):
        text = f'input {name}: an object that is not {{"b64": "…"}}'
        raise DataError(text, hint="inputs are nested lists by input name") from None


def _typed(name: str, value: Any, number: int) -> Array:
    want = numpy_dtype(number)
    try:
        # What JSON holds must fit: neither text nor 1.5 is a whole number.
        if np.array(value).dtype.kind not in _FITTING.get(want.kind, "OSU"):
            raise TypeError("a value of another type")
        return np.array(value, dtype=want)
    except (ValueError, TypeError, OverflowError) as exc:
        text = f"input {name}: not a tensor of {dtype_name(number)}: {exc}"
        raise DataError(text, hint="compare with the model's signature") from exc


def as_batch(array: Array, rows: int) -> Array:
    """Return `rows` rows: the array's own, repeated in turn or cut; axis 0 is the batch.

    Raises: DataError for a scalar or an array without rows.
    """
    if array.ndim == 0 or len(array) == 0:
        text = (
            f"input of shape {list(array.shape)} has no rows to make a batch of {rows}"
        )
        raise DataError(text, hint="leave --batch out to send it as it is")
    return array[np.arange(rows) % len(array)]


def type_name(array: Array) -> str:
    """Return numpy's name of the element type; `string` for bytes objects."""
    return "string" if array.dtype.kind == "O" else str(array.dtype)


def json_value(array: Array) -> Any:
    """Return an array as JSON values.

    Bytes become text, or `{"b64": …}` if they are none; a complex number a pair.
    """
    if array.dtype.kind == "O":
        return _json_bytes(array.tolist())
    if array.dtype.kind == "c":
        array = np.stack([array.real, array.imag], axis=-1)
    return array.tolist()


def _json_bytes(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_json_bytes(one) for one in value]
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"b64": base64.b64encode(value).decode()}
