"""The calls of the server, whichever way they came: gRPC or REST."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import grpc

from tdxd.host import tf_messages
from tdxd.model_server.examples import classify, regress
from tdxd.model_server.failure import RpcFailure
from tdxd.model_server.metrics import Metrics
from tdxd.model_server.predict import (
    DEFAULT_SIGNATURE,
    AroundRun,
    answer_predict,
    execute,
    fill_model_spec,
)
from tdxd.model_server.registry import Array, Registry, Servable

__all__ = ["Calls"]

_SIGNATURE_DEF = "signature_def"
_INVALID = grpc.StatusCode.INVALID_ARGUMENT


class Calls:
    """Answers requests and measures it; safe to use from any thread.

    `check_method`: Classify and Regress want signatures that name them as their method.
    """

    def __init__(
        self,
        registry: Registry,
        metrics: Metrics,
        *,
        respond_with_content: bool = False,
        check_method: bool = False,
    ) -> None:
        self._registry = registry
        self._metrics = metrics
        self._respond_with_content = respond_with_content
        self._check_method = check_method

    @contextlib.contextmanager
    def measured(self, spec: Any, api: str, entrypoint: str) -> Iterator[None]:
        """Count what is done inside as one request, by its status and with its latency."""
        started_s = time.monotonic()
        status = "INTERNAL"
        try:
            yield
            status = "OK"
        except RpcFailure as exc:
            status = exc.code.name
            raise
        finally:
            self._metrics.answered(
                model=self._counted(spec),
                api=api,
                entrypoint=entrypoint,
                status=status,
                elapsed_s=time.monotonic() - started_s,
            )

    def _counted(self, spec: Any) -> str:
        """Return a model's name as it is counted: names of models that do not exist are one."""
        name: str = spec.name
        return name if self._registry.knows(name) else ""

    def _around_run(self, spec: Any, api: str) -> AroundRun:
        @contextlib.contextmanager
        def around() -> Iterator[None]:
            started_s = time.monotonic()
            yield
            elapsed_s = time.monotonic() - started_s
            model = self._counted(spec)
            self._metrics.executed(model=model, api=api, elapsed_s=elapsed_s)

        return around

    def predict(self, request: Any) -> Any:
        """Answer a PredictRequest.

        Raises (as all of these): RpcFailure with TensorFlow Serving's codes and texts.
        """
        response = tf_messages.predict().PredictResponse()
        answer_predict(
            self._registry,
            request,
            response,
            with_content=self._respond_with_content,
            around_run=self._around_run(request.model_spec, "Predict"),
        )
        return response

    def outputs(self, request: Any) -> Mapping[str, Array]:
        """Answer a PredictRequest with arrays."""
        _version, servable = self._registry.resolve(request.model_spec)
        around_run = self._around_run(request.model_spec, "Predict")
        _key, outputs = execute(servable, request, around_run)
        return outputs

    def input_kinds(self, spec: Any) -> dict[str, int]:
        """Return the element type of each input of the signature that a ModelSpec means."""
        _version, servable = self._registry.resolve(spec)
        name = spec.signature_name or DEFAULT_SIGNATURE
        signature = servable.signatures.get(name)
        if signature is None:
            text = f'Serving signature name: "{name}" not found in signature def'
            raise RpcFailure(_INVALID, text)
        return {alias: info.dtype for alias, info in signature.inputs.items()}

    def classify(self, request: Any) -> Any:
        """Answer a ClassificationRequest."""
        version, servable = self._resolve(request)
        response = tf_messages.classification().ClassificationResponse()
        key = classify(
            servable,
            request,
            response.result,
            check_method=self._check_method,
            around_run=self._around_run(request.model_spec, "Classify"),
        )
        fill_model_spec(response, request.model_spec.name, version, key)
        return response

    def regress(self, request: Any) -> Any:
        """Answer a RegressionRequest."""
        version, servable = self._resolve(request)
        response = tf_messages.regression().RegressionResponse()
        key = regress(
            servable,
            request,
            response.result,
            check_method=self._check_method,
            around_run=self._around_run(request.model_spec, "Regress"),
        )
        fill_model_spec(response, request.model_spec.name, version, key)
        return response

    def _resolve(self, request: Any) -> tuple[int, Servable]:
        if not request.HasField("model_spec"):
            raise RpcFailure(_INVALID, "Missing ModelSpec")
        return self._registry.resolve(request.model_spec)

    def metadata(self, request: Any) -> Any:
        """Answer a GetModelMetadataRequest."""
        if not request.HasField("model_spec"):
            raise RpcFailure(_INVALID, "Missing ModelSpec")
        if not request.metadata_field:
            text = "GetModelMetadataRequest must specify at least one metadata_field"
            raise RpcFailure(_INVALID, text)
        for field in request.metadata_field:
            if field != _SIGNATURE_DEF:
                raise RpcFailure(_INVALID, f"Metadata field {field} is not supported")
        version, servable = self._registry.resolve(request.model_spec)
        messages = tf_messages.model_metadata()
        response = messages.GetModelMetadataResponse()
        fill_model_spec(response, request.model_spec.name, version, "")
        signatures = messages.SignatureDefMap()
        for key, signature in servable.signatures.items():
            signatures.signature_def[key].MergeFromString(signature.SerializeToString())
        response.metadata[_SIGNATURE_DEF].Pack(signatures)
        return response

    def status(self, request: Any) -> Any:
        """Answer a GetModelStatusRequest."""
        if not request.HasField("model_spec"):
            raise RpcFailure(_INVALID, "Missing ModelSpec")
        response = tf_messages.model_status().GetModelStatusResponse()
        for state in self._registry.status(request.model_spec):
            one = response.model_version_status.add()
            one.version = state.version
            one.state = int(state.state)
            one.status.SetInParent()
            one.status.error_code = state.error_code
            one.status.error_message = state.error_text
        return response
