"""Answers of the REST API as JSON.

Source of forms and texts: tensorflow_serving/util/json_tensor.cc, and for status and metadata
model_servers/http_rest_api_util.cc. Lines break elsewhere.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from typing import Any

import grpc
import numpy as np
from google.protobuf import json_format

from tdxd.core.tensors import DT_STRING, dtype_name, dtype_of
from tdxd.host import tf_messages
from tdxd.model_server.failure import RpcFailure
from tdxd.model_server.registry import Array

__all__ = [
    "classifications_json",
    "columns_json",
    "error_json",
    "metadata_json",
    "regressions_json",
    "rows_json",
    "status_json",
]

_INVALID = grpc.StatusCode.INVALID_ARGUMENT
_TOKENS = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def rows_json(outputs: Mapping[str, Array]) -> bytes:
    """Return outputs row by row; a single output has no name.

    Raises: RpcFailure for outputs that are no rows, or differ in their number.
    """
    count = -1
    for name, array in outputs.items():
        if array.ndim == 0:
            raise RpcFailure(_INVALID, f"Tensor name: {name} has no shape information ")
        if count not in (-1, array.shape[0]):
            raise RpcFailure(
                _INVALID,
                f"Tensor name: {name} has inconsistent batch size: {array.shape[0]} "
                f"expecting: {count}",
            )
        count = array.shape[0]
    if len(outputs) == 1:
        ((name, array),) = outputs.items()
        return f'{{\n    "predictions": {_encoded(name, array)}\n}}'.encode()
    columns = {
        name: [_encoded(name, row) for row in array] for name, array in outputs.items()
    }
    rows = [
        "{"
        + ", ".join(f"{json.dumps(name)}: {columns[name][row]}" for name in columns)
        + "}"
        for row in range(count)
    ]
    joined = ",\n        ".join(rows)
    return f'{{\n    "predictions": [\n        {joined}\n    ]\n}}'.encode()


def columns_json(outputs: Mapping[str, Array]) -> bytes:
    """Return outputs whole; a single output has no name.

    Raises: RpcFailure for an element type that JSON does not have.
    """
    encoded = {name: _encoded(name, array) for name, array in outputs.items()}
    if len(encoded) == 1:
        text = next(iter(encoded.values()))
    else:
        pairs = [f"{json.dumps(name)}: {value}" for name, value in encoded.items()]
        text = "{\n        " + ",\n        ".join(pairs) + "\n    }"
    return f'{{\n    "outputs": {text}\n}}'.encode()


def _encoded(name: str, array: Any) -> str:
    array = np.asarray(array) if not isinstance(array, bytes) else _scalar(array)
    number = dtype_of(array)
    if number == DT_STRING:
        return json.dumps(_strings(name, array.tolist()), ensure_ascii=False)
    if array.dtype.kind == "c":
        text = f"Failed to write JSON value for tensor type: {dtype_name(number)}"
        raise RpcFailure(_INVALID, text)
    if array.dtype.kind in "iub":
        return json.dumps(array.tolist())
    return _nested(_decimals(array), list(array.shape))


def _scalar(value: bytes) -> Array:
    made = np.empty((), dtype=object)
    made[()] = value
    return made


def _decimals(array: Array) -> list[str]:
    """Return each float as the shortest text that reads back as the same."""
    narrow = array.dtype.itemsize < 8
    flat = array.astype(np.float32 if narrow else np.float64).reshape(-1)
    return [_TOKENS.get(text, text) for text in flat.astype("U32").tolist()]


def _nested(items: list[str], shape: list[int]) -> str:
    if not shape:
        return items[0]
    for axis in range(len(shape) - 1, 0, -1):
        size = shape[axis]
        items = [
            f"[{', '.join(items[at * size : (at + 1) * size])}]"
            for at in range(math.prod(shape[:axis]))
        ]
    return f"[{', '.join(items)}]"


def _strings(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_strings(name, item) for item in value]
    if not name.endswith("_bytes"):
        try:
            return value.decode() if isinstance(value, bytes) else value
        except UnicodeDecodeError:
            pass  # TensorFlow Serving sends text that is no JSON: nothing is lost this way
    return {"b64": base64.b64encode(value).decode()}


def classifications_json(result: Any) -> bytes:
    """Return a ClassificationResult: a list of label and score for each example."""
    rows = []
    for row in result.classifications:
        scores = _decimals(np.array([one.score for one in row.classes], np.float32))
        labels = [json.dumps(one.label, ensure_ascii=False) for one in row.classes]
        pairs = [f"[{pair[0]}, {pair[1]}]" for pair in zip(labels, scores, strict=True)]
        rows.append(f"[{', '.join(pairs)}]")
    return _results(rows)


def regressions_json(result: Any) -> bytes:
    """Return a RegressionResult: a number for each example."""
    values = [one.value for one in result.regressions]
    return _results(_decimals(np.array(values, np.float32)))


def _results(rows: list[str]) -> bytes:
    return f'{{\n    "results": [{", ".join(rows)}]\n}}'.encode()


def error_json(text: str) -> bytes:
    """Return an error as JSON."""
    return json.dumps({"error": text}, indent=4, ensure_ascii=False).encode()


def status_json(response: Any) -> bytes:
    """Return a GetModelStatusResponse as JSON; 64-bit numbers are strings."""
    text: str = json_format.MessageToJson(
        response, indent=1, always_print_fields_with_no_presence=True
    )
    return text.encode()


def metadata_json(response: Any) -> bytes:
    """Return a GetModelMetadataResponse as JSON."""
    signatures = tf_messages.model_metadata().SignatureDefMap()
    response.metadata["signature_def"].Unpack(signatures)
    how: dict[str, Any] = {
        "always_print_fields_with_no_presence": True,
        "preserving_proto_field_name": True,
    }
    spec = json_format.MessageToDict(response.model_spec, **how)
    shown = json_format.MessageToDict(signatures, **how)
    made = {"model_spec": spec, "metadata": {"signature_def": shown}}
    return json.dumps(made, indent=1).encode()
