"""A model server double: real gRPC over real TLS, answers made of the request.

Its models: `double` returns twice its input `x` as `y`; `pixels` too, but says in its metadata
that `x` is float [?, 2, 3, 3]; `slow` waits, `busy` answers RESOURCE_EXHAUSTED to every third
call; every other name is NOT_FOUND.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from tdxd.core.tensors import read_tensor, write_values
from tdxd.host import tf_messages
from tests.certificates import self_signed

__all__ = ["Double", "double_handlers", "running_double"]


@dataclasses.dataclass(slots=True)
class Double:
    """A running double: its address, its certificate, and what it was asked.

    `slow` waits for `release`; `waiting` is released once for each call that waits.
    """

    address: str
    ca: Path
    requests: list[Any]
    release: threading.Event
    waiting: threading.Semaphore


@contextlib.contextmanager
def running_double(
    directory: Path,
    *,
    name: str = "localhost",
    client_ca_pem: bytes | None = None,
    tls: bool = True,
) -> Iterator[Double]:
    """Serve on a free port of the loopback until the block ends.

    With `client_ca_pem` only to clients whose certificate that vouches for.
    """
    pem, public = self_signed(name)
    ca = directory / f"{name}.pem"
    ca.write_bytes(public)
    requests: list[Any] = []
    release, waiting = threading.Event(), threading.Semaphore(0)
    handlers = [double_handlers(requests, release, waiting)]
    server = grpc.server(futures.ThreadPoolExecutor(4), handlers=handlers)
    credentials = grpc.ssl_server_credentials(
        [(pem, public)], client_ca_pem, client_ca_pem is not None
    )
    if tls:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield Double(
            address=f"localhost:{port}",
            ca=ca,
            requests=requests,
            release=release,
            waiting=waiting,
        )
    finally:
        release.set()
        server.stop(None).wait()


def double_handlers(
    requests: list[Any], release: threading.Event, waiting: threading.Semaphore
) -> Any:
    """Return what makes a gRPC server a double, for one of somebody else's."""
    predict, metadata = tf_messages.predict(), tf_messages.model_metadata()
    counter = itertools.count(1)

    def on_predict(request: Any, context: Any) -> Any:
        requests.append(request)
        model = request.model_spec.name
        if model == "slow":
            waiting.release()
            release.wait(30)
        if model == "busy" and next(counter) % 3 == 0:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many")
        if model not in ("double", "pixels", "slow", "busy"):
            text = f"Servable not found for request: Latest({model})"
            context.abort(grpc.StatusCode.NOT_FOUND, text)
        if "x" not in request.inputs:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no x")
        response = predict.PredictResponse()
        response.model_spec.name = model
        response.model_spec.version.value = request.model_spec.version.value or 7
        response.model_spec.signature_name = request.model_spec.signature_name
        write_values(response.outputs["y"], read_tensor(request.inputs["x"]) * 2)
        if request.model_spec.signature_name == "two":
            text_output = np.array([b"a", b"\xff"], object)
            write_values(response.outputs["t"], text_output)
        return response

    def on_metadata(request: Any, context: Any) -> Any:
        requests.append(request)
        response = metadata.GetModelMetadataResponse()
        signatures = metadata.SignatureDefMap()
        if request.model_spec.name not in ("double", "pixels", "slow", "busy"):
            text = f"Servable not found for request: Latest({request.model_spec.name})"
            context.abort(grpc.StatusCode.NOT_FOUND, text)
        response.model_spec.version.value = 7
        default = signatures.signature_def["serving_default"]
        default.inputs["x"].dtype = 1
        if request.model_spec.name == "pixels":
            for size in (-1, 2, 3, 3):
                default.inputs["x"].tensor_shape.dim.add().size = size
            default.outputs["y"].dtype = 1
        for alias in ("x", "z"):
            signatures.signature_def["two"].inputs[alias].dtype = 3
        response.metadata["signature_def"].Pack(signatures)
        return response

    return grpc.method_handlers_generic_handler(
        tf_messages.PREDICTION_SERVICE,
        {
            "Predict": _method(on_predict, predict.PredictRequest),
            "GetModelMetadata": _method(on_metadata, metadata.GetModelMetadataRequest),
        },
    )


def _method(call: Any, request_class: Any) -> Any:
    return grpc.unary_unary_rpc_method_handler(
        call,
        request_deserializer=request_class.FromString,
        response_serializer=lambda response: response.SerializeToString(),
    )
