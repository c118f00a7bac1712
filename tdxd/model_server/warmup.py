"""Executes a model's recorded requests before it answers real ones, which then find it warm.

Source: tensorflow_serving/servables/tensorflow/saved_model_warmup_util.cc (the file, the limit, and
that a failure is the load's). Records of calls that this server does not have are left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from tdxd.core.tfrecord import read_records
from tdxd.errors import DataError
from tdxd.host import tf_messages
from tdxd.model_server.examples import classify, regress
from tdxd.model_server.failure import RpcFailure
from tdxd.model_server.predict import execute
from tdxd.model_server.registry import Servable

__all__ = ["warm_up"]

_FILE = "assets.extra/tf_serving_warmup_requests"
_MAX_RECORDS = 1000


def _classify(servable: Servable, request: Any) -> None:
    result = tf_messages.classification().ClassificationResult()
    classify(servable, request, result)


def _regress(servable: Servable, request: Any) -> None:
    regress(servable, request, tf_messages.regression().RegressionResult())


_EXECUTE: Mapping[str, Callable[[Servable, Any], object]] = {
    "predict_log": execute,
    "classify_log": _classify,
    "regress_log": _regress,
}


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
    for kind, request in requests:
        for _ in range(rounds):
            _EXECUTE[kind](servable, request)
    log(
        f"Finished reading warmup data for model at {path}. "
        f"Number of warmup records read: {len(requests)}."
    )


def _read(file: str, log: Callable[[str], None]) -> list[tuple[str, Any]]:
    requests: list[tuple[str, Any]] = []
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
            if kind in _EXECUTE:
                requests.append((kind, getattr(one, kind).request))
            else:
                log(f"Unsupported log_type for warmup: {kind}; left out")
    except (OSError, DataError, DecodeError) as exc:
        raise RpcFailure(grpc.StatusCode.DATA_LOSS, f"{file}: {exc}") from exc
    return requests
