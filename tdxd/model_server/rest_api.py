"""The REST API: which path and method mean what, without HTTP around it.

Source: tensorflow_serving/model_servers/http_rest_api_handler.cc, http_rest_api_util.cc (paths),
http_server.cc (status codes), get_model_status_impl.cc.
"""

from __future__ import annotations

import dataclasses
import re
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

import grpc

from tdxd.core.tensors import write_content
from tdxd.host import tf_messages
from tdxd.model_server import rest_response
from tdxd.model_server.calls import Calls
from tdxd.model_server.failure import RpcFailure, truncated
from tdxd.model_server.json_values import parse_body, signature_name
from tdxd.model_server.metrics import Metrics
from tdxd.model_server.rest_examples import fill_examples
from tdxd.model_server.rest_request import read_tensors

__all__ = ["Answer", "RestApi", "failure_answer"]

_PREDICTION = re.compile(
    r"/v1/models/([^/:]+)(?:/versions/(\d+)|/labels/([^/:]+))?:(classify|regress|predict)",
    re.IGNORECASE | re.ASCII,
)
_STATUS = re.compile(
    r"/v1/models(?:/([^/:]+))?(?:/versions/(\d+)|/labels/([^/:]+))?(/metadata)?",
    re.IGNORECASE | re.ASCII,
)
_OURS = re.compile(r"/v1/.*", re.IGNORECASE)
_INVALID = grpc.StatusCode.INVALID_ARGUMENT
_JSON = "application/json"
_TEXT = "text/plain"

# Codes that are none of these are errors of the server: 500. Source: ToHTTPStatusCode.
_HTTP: Mapping[grpc.StatusCode, int] = {
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.UNAUTHENTICATED: 401,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What goes back: HTTP status, content type, body."""

    status: int
    body: bytes
    content_type: str = _JSON


def failure_answer(code: grpc.StatusCode, text: str) -> Answer:
    """Return the answer to a request that failed."""
    status = _HTTP.get(code, 500)
    return Answer(status=status, body=rest_response.error_json(truncated(text)))


class RestApi:
    """Answers requests; `metrics_path` is where Prometheus looks, or empty."""

    def __init__(self, calls: Calls, metrics: Metrics, *, metrics_path: str) -> None:
        self._calls = calls
        self._metrics = metrics
        self._metrics_path = metrics_path

    def computes(self, method: str, path: str) -> bool:
        """Say whether a request executes a model, or is answered from what is known."""
        return method == "POST" and bool(_PREDICTION.fullmatch(path))

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        """Answer one request; never raises for what a client sent."""
        if self._metrics_path and path == self._metrics_path and method == "GET":
            text = self._metrics.text().encode()
            return Answer(status=200, body=text, content_type=_TEXT)
        if not _OURS.fullmatch(path):
            return Answer(status=404, body=b"Not Found\n", content_type=_TEXT)
        try:
            return Answer(status=200, body=self._respond(method, path, body))
        except RpcFailure as exc:
            return failure_answer(exc.code, exc.text)

    def _respond(self, method: str, path: str, body: bytes) -> bytes:
        found = _PREDICTION.fullmatch(path) if method == "POST" else None
        if found:
            return self._execute(found[4].lower(), _spec(found), body)
        found = _STATUS.fullmatch(path) if method == "GET" else None
        if not found:
            raise RpcFailure(_INVALID, f"Malformed request: {method} {path}")
        if not found[1]:
            raise RpcFailure(_INVALID, "Missing model name in request.")
        return self._describe(_spec(found), metadata=bool(found[4]))

    def _execute(self, what: str, spec: Callable[[Any], None], body: bytes) -> bytes:
        methods: Mapping[str, tuple[Any, Callable[[Any, bytes], bytes]]] = {
            "predict": (tf_messages.predict().PredictRequest, self._predict),
            "classify": (
                tf_messages.classification().ClassificationRequest,
                self._classify,
            ),
            "regress": (tf_messages.regression().RegressionRequest, self._regress),
        }
        request_class, method = methods[what]
        request = request_class()
        spec(request.model_spec)
        with self._calls.measured(request.model_spec, what.capitalize(), "REST"):
            return method(request, body)

    def _predict(self, request: Any, body: bytes) -> bytes:
        document = parse_body(body)
        name = signature_name(document)
        request.model_spec.signature_name = name
        # Only the model's signature says what the JSON means.
        kinds = self._calls.input_kinds(request.model_spec)
        if not kinds:
            text = f"Failed to get input map for signature: {name or 'DEFAULT'}"
            raise RpcFailure(_INVALID, text)
        form, inputs = read_tensors(document, kinds)
        for alias, array in inputs.items():
            write_content(request.inputs[alias], array)
        outputs = self._calls.outputs(request)
        if form == "row":
            return rest_response.rows_json(outputs)
        return rest_response.columns_json(outputs)

    def _classify(self, request: Any, body: bytes) -> bytes:
        _fill_examples(request, body)
        return rest_response.classifications_json(self._calls.classify(request).result)

    def _regress(self, request: Any, body: bytes) -> bytes:
        _fill_examples(request, body)
        return rest_response.regressions_json(self._calls.regress(request).result)

    def _describe(self, spec: Callable[[Any], None], *, metadata: bool) -> bytes:
        if metadata:
            request = tf_messages.model_metadata().GetModelMetadataRequest()
            spec(request.model_spec)
            request.metadata_field.append("signature_def")
            return rest_response.metadata_json(self._calls.metadata(request))
        request = tf_messages.model_status().GetModelStatusRequest()
        spec(request.model_spec)
        return rest_response.status_json(self._calls.status(request))


def _fill_examples(request: Any, body: bytes) -> None:
    document = parse_body(body)
    request.model_spec.signature_name = signature_name(document)
    fill_examples(document, request.input)


def _spec(found: re.Match[str]) -> Callable[[Any], None]:
    """Return what fills a ModelSpec with the name, version and label of a path."""
    name, version = urllib.parse.unquote(found[1]), found[2]
    if version and int(version) >= 2**63:
        text = f"Failed to convert version: {version} to numeric."
        raise RpcFailure(_INVALID, text)

    def fill(message: Any) -> None:
        message.name = name
        if version:
            message.version.value = int(version)
        if found[3]:
            message.version_label = urllib.parse.unquote(found[3])

    return fill
