"""Executes a model's recorded requests before it answers real ones, which then find it warm.

Source: tensorflow_serving/servables/tensorflow/saved_model_warmup_util.cc (the file, the limit, and
that a failure is the load's); of the kinds of records only Predict is a call of this server.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from tdxd.core.tfrecord import read_records
from tdxd.errors import DataError
from tdxd.host import tf_messages
from tdxd.model_server.failure import RpcFailure
from tdxd.model_server.predict import execute
from tdxd.model_server.registry import Servable

__all__ = ["warm_up"]

_FILE = "assets.extra/tf_serving_warmup_requests"
_MAX_RECORDS = 1000


def warm_up(
    servable: Servable, path: str, *, rounds: int, log: Callable[[str], None]
) -> None:
    """Execute the requests of the warm-up file in a version's directory, if it has one.

    Raises: RpcFailure for a file that is damaged or too long, and for a request that fails.
    """
    file = os.path.join(path, _FILE)
    if not rounds or not os.path.exists(file):
        return
    requests = _read(file, log)
    for request in requests:
        for _ in range(rounds):
            execute(servable, request)
    log(
        f"Finished reading warmup data for model at {path}. "
        f"Number of warmup records read: {len(requests)}."
    )


def _read(file: str, log: Callable[[str], None]) -> list[Any]:
    requests = []
    try:
        with open(file, "rb") as opened:
            data = opened.read()
        for count, record in enumerate(read_records(data, source=file)):
            if count >= _MAX_RECORDS:
                raise RpcFailure(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    "Number of warmup records exceeds the maximum "
                    f"({_MAX_RECORDS}) at {file}",
                )
            one = tf_messages.prediction_log().PredictionLog.FromString(record)
            kind = one.WhichOneof("log_type")
            if kind == "predict_log":
                requests.append(one.predict_log.request)
            else:
                log(f"Unsupported log_type for warmup: {kind}; left out")
    except (OSError, DataError, DecodeError) as exc:
        raise RpcFailure(grpc.StatusCode.DATA_LOSS, f"{file}: {exc}") from exc
    return requests
