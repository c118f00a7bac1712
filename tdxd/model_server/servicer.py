"""The gRPC calls of the server, as generic handlers over TensorFlow Serving's messages."""

from __future__ import annotations

from collections.abc import Callable
from concurrent import futures
from typing import Any

import grpc

from tdxd.host import tf_messages
from tdxd.model_server.calls import Calls
from tdxd.model_server.failure import RpcFailure, truncated

__all__ = ["Reload", "handlers"]

Reload = Callable[[Any, Callable[[], bool]], None]
"""Serves a ModelServerConfig instead; the second argument says whether the caller still waits.

Raises: RpcFailure.
"""


def handlers(
    calls: Calls, reload: Reload, quick: futures.ThreadPoolExecutor
) -> list[grpc.GenericRpcHandler]:
    """Return the handlers of PredictionService and ModelService.

    `quick` is the pool of what answers at once, so that a server whose every thread computes still
    says that it is ready.
    """
    # Reloads wait for models; one after the other, as the original's lock has them.
    slow = futures.ThreadPoolExecutor(1, thread_name_prefix="reload")
    return [
        grpc.method_handlers_generic_handler(
            tf_messages.PREDICTION_SERVICE, _prediction(calls, quick)
        ),
        grpc.method_handlers_generic_handler(
            tf_messages.MODEL_SERVICE, _model(calls, reload, quick, slow)
        ),
    ]


def _prediction(
    calls: Calls, quick: futures.ThreadPoolExecutor
) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
    def measured(api: str, answer: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
        def on_request(request: Any, _context: Any) -> Any:
            with calls.measured(request.model_spec, api, "GRPC"):
                return answer(request)

        return on_request

    classification = tf_messages.classification()
    return {
        "Predict": _handler(
            measured("Predict", calls.predict),
            tf_messages.predict().PredictRequest,
            None,
        ),
        "Classify": _handler(
            measured("Classify", calls.classify),
            classification.ClassificationRequest,
            None,
        ),
        "Regress": _handler(
            measured("Regress", calls.regress),
            tf_messages.regression().RegressionRequest,
            None,
        ),
        "GetModelMetadata": _handler(
            lambda request, _context: calls.metadata(request),
            tf_messages.model_metadata().GetModelMetadataRequest,
            quick,
        ),
    }


def _model(
    calls: Calls,
    reload: Reload,
    quick: futures.ThreadPoolExecutor,
    slow: futures.ThreadPoolExecutor,
) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
    management = tf_messages.model_management()

    def on_reload(request: Any, context: Any) -> Any:
        reload(request.config, context.is_active)
        response = management.ReloadConfigResponse()
        response.status.SetInParent()
        return response

    return {
        "GetModelStatus": _handler(
            lambda request, _context: calls.status(request),
            tf_messages.model_status().GetModelStatusRequest,
            quick,
        ),
        "HandleReloadConfigRequest": _handler(
            on_reload, management.ReloadConfigRequest, slow
        ),
    }


def _handler(
    answer: Callable[[Any, Any], Any],
    request_class: Any,
    pool: futures.ThreadPoolExecutor | None,
) -> Any:
    def call(request: Any, context: Any) -> Any:
        if not context.is_active():  # it gave up while it waited for a thread
            context.abort(grpc.StatusCode.CANCELLED, "the caller has gone")
        try:
            return answer(request, context)
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
