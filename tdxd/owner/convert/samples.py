"""Inputs to try a model with: from files, or made up; and the warm-up record that holds them.

Source: tensorflow_serving/apis/prediction_log.proto; the place and name of the file from
tensorflow_serving/servables/tensorflow/saved_model_warmup_util.h.
"""

from __future__ import annotations

import array
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tdxd.core.frozen_graph import shape_text, write_shape
from tdxd.core.npy import NpyArray, read_npy
from tdxd.core.signature import Endpoint, Signature
from tdxd.core.tfrecord import write_records
from tdxd.errors import DataError, HostError
from tdxd.host import tf_messages

__all__ = ["WARMUP_FILE", "sample_of", "warmup_records"]

WARMUP_FILE = "assets.extra/tf_serving_warmup_requests"

_DT_STRING = 7
# Bytes of an element, by DataType number. Source: types.proto.
_SIZES = {
    number: size
    for size, numbers in {
        1: (4, 6, 10),
        2: (5, 14, 17, 19),
        4: (1, 3, 22),
        8: (2, 8, 9, 23),
        16: (18,),
    }.items()
    for number in numbers
}
_RANDOM = {1: "f", 2: "d"}
"""Types whose made-up values are drawn; others are zeros, which are valid indices, too."""
_MAX_MADE_UP_BYTES = 64 << 20


def sample_of(signature: Signature, given: Mapping[str, Path]) -> dict[str, Any] | str:
    """Return a TensorProto for each input, by key, or why none can be made up.

    `given` are files by key: .npy, or the bytes of one string for an input of strings.

    Raises: DataError for a file that does not fit its input, HostError.
    """
    made: dict[str, Any] = {}
    for one in signature.inputs:
        if one.key in given:
            made[one.key] = _from_file(one, given[one.key])
            continue
        found = _made_up(one)
        if found is None:
            return f"no input can be made up for {one.key}"
        made[one.key] = found
    return made


def _from_file(endpoint: Endpoint, path: Path) -> Any:
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise HostError.of("read", str(path), exc) from exc
    if endpoint.dtype == _DT_STRING:
        shape = tuple(1 for _ in endpoint.shape or ())
        message = _message(_DT_STRING, shape)
        message.string_val.append(data)
    else:
        found = read_npy(data, source=str(path))
        shape = found.shape
        _check_type(endpoint, found)
        message = _message(found.dtype, shape)
        message.tensor_content = found.content
    _check_shape(endpoint, shape)
    return message


def _made_up(endpoint: Endpoint) -> Any | None:
    """Return numbers for an input; None if its rank is unknown, or for strings, or if too many."""
    dtype = endpoint.dtype
    if endpoint.shape is None or dtype not in _SIZES:
        return None
    shape = tuple(1 if size is None else size for size in endpoint.shape)
    count = math.prod(shape)
    if count * _SIZES[dtype] > _MAX_MADE_UP_BYTES:
        return None
    message = _message(dtype, shape)
    if dtype in _RANDOM:
        drawn = random.Random(0)  # noqa: S311 - the same each time is what is wanted
        values = array.array(_RANDOM[dtype], (drawn.random() for _ in range(count)))
        message.tensor_content = values.tobytes()
    else:
        message.tensor_content = bytes(count * _SIZES[dtype])
    return message


def _message(dtype: int, shape: tuple[int, ...]) -> Any:
    message = tf_messages.tensor().TensorProto(dtype=dtype)
    write_shape(message.tensor_shape, shape)
    return message


def _check_type(endpoint: Endpoint, given: NpyArray) -> None:
    if given.dtype != endpoint.dtype:
        raise DataError(
            f"sample {endpoint.key}: elements of {tf_messages.type_name(given.dtype)}, the "
            f"input has {tf_messages.type_name(endpoint.dtype)}",
            hint="convert it with numpy's astype",
        )


def _check_shape(endpoint: Endpoint, given: tuple[int, ...]) -> None:
    if endpoint.shape is None:
        return
    fits = len(given) == len(endpoint.shape) and all(
        want in (None, got) for want, got in zip(endpoint.shape, given, strict=True)
    )
    if not fits:
        raise DataError(
            f"sample {endpoint.key}: shape {shape_text(given)}, the input has "
            f"{shape_text(endpoint.shape)}"
        )


def warmup_records(model: str, samples: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return the content of a warm-up file: one Predict request for each signature."""
    log_class = tf_messages.prediction_log().PredictionLog
    records = []
    for name, sample in samples.items():
        log = log_class()
        request = log.predict_log.request
        request.model_spec.name = model
        request.model_spec.signature_name = name
        for key, message in sample.items():
            request.inputs[key].CopyFrom(message)
        records.append(log.SerializeToString(deterministic=True))
    return write_records(records)
