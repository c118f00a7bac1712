"""The gRPC calls of the server, as generic handlers over TensorFlow Serving's messages."""

from __future__ import annotations

from collections.abc import Callable
from concurrent import futures
from typing import Any

import grpc

from tdxd.host import tf_messages
from tdxd.model_server.failure import RpcFailure, truncated
from tdxd.model_server.predict import answer_predict, fill_model_spec
from tdxd.model_server.registry import Registry

__all__ = ["handlers"]

_SIGNATURE_DEF = "signature_def"
_INVALID = grpc.StatusCode.INVALID_ARGUMENT


def handlers(
    registry: Registry, *, respond_with_content: bool
) -> list[grpc.GenericRpcHandler]:
    """Return the handlers of PredictionService and ModelService."""
    predict = tf_messages.predict()
    metadata = tf_messages.model_metadata()
    status = tf_messages.model_status()

    def on_predict(request: Any) -> Any:
        response = predict.PredictResponse()
        answer_predict(registry, request, response, with_content=respond_with_content)
        return response

    def on_metadata(request: Any) -> Any:
        return _metadata(registry, request, metadata)

    def on_status(request: Any) -> Any:
        return _status(registry, request, status)

    # These answer at once and have a thread of their own, so that a server whose every thread
    # computes still says that it is ready.
    quick = futures.ThreadPoolExecutor(1, thread_name_prefix="status")
    return [
        grpc.method_handlers_generic_handler(
            tf_messages.PREDICTION_SERVICE,
            {
                "Predict": _handler(on_predict, predict.PredictRequest, None),
                "GetModelMetadata": _handler(
                    on_metadata, metadata.GetModelMetadataRequest, quick
                ),
            },
        ),
        grpc.method_handlers_generic_handler(
            tf_messages.MODEL_SERVICE,
            {
                "GetModelStatus": _handler(
                    on_status, status.GetModelStatusRequest, quick
                )
            },
        ),
    ]


def _handler(
    answer: Callable[[Any], Any],
    request_class: Any,
    pool: futures.ThreadPoolExecutor | None,
) -> Any:
    def call(request: Any, context: Any) -> Any:
        if not context.is_active():  # it gave up while it waited for a thread
            context.abort(grpc.StatusCode.CANCELLED, "the caller has gone")
        try:
            return answer(request)
        except RpcFailure as exc:
            context.abort(exc.code, truncated(exc.text))

    if pool is not None:
        # grpcio's own name for the thread pool of one method.
        call.experimental_thread_pool = pool  # type: ignore[attr-defined]
    return grpc.unary_unary_rpc_method_handler(
        call,
        request_deserializer=request_class.FromString,
        response_serializer=lambda response: response.SerializeToString(),
    )


def _metadata(registry: Registry, request: Any, messages: Any) -> Any:
    if not request.HasField("model_spec"):
        raise RpcFailure(_INVALID, "Missing ModelSpec")
    if not request.metadata_field:
        text = "GetModelMetadataRequest must specify at least one metadata_field"
        raise RpcFailure(_INVALID, text)
    for field in request.metadata_field:
        if field != _SIGNATURE_DEF:
            raise RpcFailure(_INVALID, f"Metadata field {field} is not supported")
    version, servable = registry.resolve(request.model_spec)
    response = messages.GetModelMetadataResponse()
    fill_model_spec(response, request.model_spec.name, version, "")
    signatures = messages.SignatureDefMap()
    for key, signature in servable.signatures.items():
        signatures.signature_def[key].MergeFromString(signature.SerializeToString())
    response.metadata[_SIGNATURE_DEF].Pack(signatures)
    return response


def _status(registry: Registry, request: Any, messages: Any) -> Any:
    if not request.HasField("model_spec"):
        raise RpcFailure(_INVALID, "Missing ModelSpec")
    response = messages.GetModelStatusResponse()
    for state in registry.status(request.model_spec):
        one = response.model_version_status.add()
        one.version = state.version
        one.state = int(state.state)
        one.status.SetInParent()
        one.status.error_code = state.error_code
        one.status.error_message = state.error_text
    return response
