"""grpc.health.v1: what the server can do now.

TensorFlow Serving answers SERVING whatever happens. Here a service is SERVING when it answers:
`PredictionService`, and the server as a whole, when every model has an available version, and
nothing once the server drains.

Source: grpc/health/v1/health.proto, grpc/doc/health-checking.md; the names without a package are
those of tensorflow_serving/model_servers/server.cc.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent import futures
from typing import Any

import grpc

from tdxd.host.tf_messages import MODEL_SERVICE, PREDICTION_SERVICE
from tdxd.model_server.small_messages import HealthCheckRequest, HealthCheckResponse

__all__ = ["HEALTH_SERVICE", "Health"]

HEALTH_SERVICE = "grpc.health.v1.Health"
_SERVING, _NOT_SERVING, _SERVICE_UNKNOWN = 1, 2, 3
_READY_ONLY = ("", PREDICTION_SERVICE, "PredictionService")
_ALWAYS = (MODEL_SERVICE, "ModelService", HEALTH_SERVICE)
_MAX_WATCHERS = 100
_Send = Callable[[Any], None]


class Health:
    """The state of the services, and those who watch it; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Held while sending, which waits for the thread that runs `leave`: never under `_lock`.
        self._telling = threading.Lock()
        self._ready = False
        self._draining = False
        self._watchers: dict[_Send, tuple[str, int]] = {}

    def put(self, *, ready: bool) -> None:
        """Say whether every model has an available version."""
        with self._lock:
            self._ready = ready
        self._tell()

    def drain(self) -> None:
        """Say that nothing is served any more, and end every watch: draining waits for calls."""
        with self._lock:
            self._draining = True
        self._tell()
        with self._telling:
            for send in self._everybody():
                send(None)
                self.leave(send)

    def status(self, service: str) -> int:
        """Return a service's ServingStatus."""
        with self._lock:
            if service in _ALWAYS:
                return _NOT_SERVING if self._draining else _SERVING
            if service in _READY_ONLY:
                serves = self._ready and not self._draining
                return _SERVING if serves else _NOT_SERVING
            return _SERVICE_UNKNOWN

    def watch(self, service: str, send: _Send) -> bool:
        """Send a service's status now and at each change; False if too many watch already."""
        with self._telling:
            with self._lock:
                draining = self._draining
                if len(self._watchers) >= _MAX_WATCHERS:
                    return False
            status = self.status(service)
            if not draining:
                with self._lock:
                    self._watchers[send] = (service, status)
            send(HealthCheckResponse(status=status))
            if draining:
                send(None)
            return True

    def leave(self, send: _Send) -> None:
        """Forget a watcher."""
        with self._lock:
            self._watchers.pop(send, None)

    def _everybody(self) -> dict[_Send, tuple[str, int]]:
        with self._lock:
            return dict(self._watchers)

    def _tell(self) -> None:
        with self._telling:
            for send, (service, told) in self._everybody().items():
                status = self.status(service)
                if status == told:
                    continue
                with self._lock:
                    if send in self._watchers:
                        self._watchers[send] = (service, status)
                send(HealthCheckResponse(status=status))

    def handler(self, pool: futures.ThreadPoolExecutor) -> grpc.GenericRpcHandler:
        """Return the service's handler; `pool` answers, so that no prediction delays it."""
        check: Any = functools.partial(_check, self)
        watch: Any = functools.partial(_watch, self)
        # grpcio's own names. A watch holds no thread: it ends when `None` is sent.
        for method in (check, watch):
            method.experimental_thread_pool = pool
        watch.experimental_non_blocking = True
        return grpc.method_handlers_generic_handler(
            HEALTH_SERVICE,
            {
                "Check": grpc.unary_unary_rpc_method_handler(
                    check,
                    request_deserializer=HealthCheckRequest.FromString,
                    response_serializer=_serialized,
                ),
                "Watch": grpc.unary_stream_rpc_method_handler(
                    watch,
                    request_deserializer=HealthCheckRequest.FromString,
                    response_serializer=_serialized,
                ),
            },
        )


def _check(health: Health, request: Any, context: Any) -> Any:
    status = health.status(request.service)
    if status == _SERVICE_UNKNOWN:
        context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service {request.service}")
    return HealthCheckResponse(status=status)


def _watch(
    health: Health, request: Any, context: Any, send_response_callback: _Send
) -> None:
    send = send_response_callback
    if not health.watch(request.service, send):
        context.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED)
        context.set_details(f"{_MAX_WATCHERS} watchers are the most")
        send(None)
    elif not context.add_callback(lambda: health.leave(send)):
        health.leave(send)


def _serialized(response: Any) -> bytes:
    data: bytes = response.SerializeToString()
    return data
