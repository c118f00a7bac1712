"""`tdx-infer predict` and `show`: numpy in and numpy out, no TensorFlow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import grpc

from tdxd.core.tensors import read_tensor, write_content
from tdxd.errors import DataError, RemoteProtocolError, TdxdError
from tdxd.host import tf_messages
from tdxd.user.endpoint import MAX_MESSAGE_BYTES, Endpoint, call_error, open_channel
from tdxd.user.inputs import Array, name_inputs
from tdxd.user.signature import check_inputs

__all__ = [
    "DEFAULT_SIGNATURE",
    "Model",
    "Prediction",
    "decode_answer",
    "encode_request",
    "fetch_signature",
    "fetch_signatures",
    "predict",
    "resolve_inputs",
]

DEFAULT_SIGNATURE = "serving_default"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Which model, version or its label (None: the latest) and signature to ask."""

    name: str
    version: int | None = None
    signature: str = DEFAULT_SIGNATURE
    label: str | None = None

    def fill(self, spec: Any) -> None:
        """Fill a ModelSpec message."""
        spec.name = self.name
        spec.signature_name = self.signature
        if self.label is not None:
            spec.version_label = self.label
        elif self.version is not None:
            spec.version.value = self.version


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """An answer: which model and version gave it, and the outputs by name."""

    model: str
    version: int
    signature: str
    outputs: Mapping[str, Array]


def predict(
    endpoint: Endpoint, model: Model, given: Mapping[str | None, Any]
) -> Prediction:
    """Send one request; `given` is what `read_input` returned.

    Raises: UnavailableError, DataError, NotAllowedError, ServeError, RemoteProtocolError.
    """
    with open_channel(endpoint) as channel:
        inputs = resolve_inputs(channel, endpoint, model, given)
        data = encode_request(model, inputs)
        try:
            answer = _call(channel, endpoint, tf_messages.PREDICT_METHOD, data)
        except DataError as exc:
            raise _explained(exc, channel, endpoint, model, inputs) from exc
    return decode_answer(answer)


def _explained(
    refusal: DataError,
    channel: grpc.Channel,
    endpoint: Endpoint,
    model: Model,
    inputs: Mapping[str, Array],
) -> DataError:
    """Say, beside the server's own words, what does not fit, if the metadata shows it."""
    try:
        check_inputs(inputs, fetch_signature(channel, endpoint, model))
    except DataError as exc:
        hint = f"{exc.message}; {exc.hint}" if exc.hint else exc.message
        return DataError(refusal.message, hint=hint)
    except TdxdError:
        pass  # no metadata: the server's words are all there is
    return refusal


def resolve_inputs(
    channel: grpc.Channel,
    endpoint: Endpoint,
    model: Model,
    given: Mapping[str | None, Any],
) -> dict[str, Array]:
    """Return arrays by name; asks the server for the signature only if it must.

    What is asked for is also compared: a tensor that cannot fit is not sent.

    Raises: as `predict`.
    """
    clear = all(
        name is not None and hasattr(value, "dtype") for name, value in given.items()
    )
    if clear:
        return name_inputs(given, None)
    signature = fetch_signature(channel, endpoint, model)
    inputs = name_inputs(given, signature)
    check_inputs(inputs, signature)
    return inputs


def fetch_signature(channel: grpc.Channel, endpoint: Endpoint, model: Model) -> Any:
    """Return the SignatureDef message that the request will meet.

    Raises: as `predict`; DataError, naming those there are, if there is no such signature.
    """
    signatures, _version = fetch_signatures(channel, endpoint, model)
    if model.signature not in signatures:
        known = ", ".join(sorted(signatures))
        text = f"model {model.name} has no signature {model.signature!r}"
        raise DataError(text, hint=f"it has: {known}")
    return signatures[model.signature]


def fetch_signatures(
    channel: grpc.Channel, endpoint: Endpoint, model: Model
) -> tuple[Mapping[str, Any], int]:
    """Return all SignatureDef messages of a model by name, and the version they are of.

    Raises: as `predict`.
    """
    messages = tf_messages.model_metadata()
    request = messages.GetModelMetadataRequest(metadata_field=["signature_def"])
    model.fill(request.model_spec)
    request.model_spec.signature_name = ""
    answer = _call(
        channel, endpoint, tf_messages.METADATA_METHOD, request.SerializeToString()
    )
    signatures = messages.SignatureDefMap()
    response = _parse(messages.GetModelMetadataResponse, answer)
    if not response.metadata["signature_def"].Unpack(signatures):
        raise RemoteProtocolError(f"{endpoint.address}: metadata without signatures")
    return signatures.signature_def, response.model_spec.version.value


def encode_request(model: Model, inputs: Mapping[str, Array]) -> bytes:
    """Return an encoded PredictRequest.

    Raises: DataError for an array that is no tensor, and for more than `MAX_MESSAGE_BYTES`.
    """
    size = sum(array.nbytes for array in inputs.values())
    if size > MAX_MESSAGE_BYTES:
        text = f"inputs of {size} bytes; at most {MAX_MESSAGE_BYTES} fit into a request"
        raise DataError(text, hint="send fewer rows at a time")
    request = tf_messages.predict().PredictRequest()
    model.fill(request.model_spec)
    for name, array in inputs.items():
        write_content(request.inputs[name], array)
    data: bytes = request.SerializeToString()
    return data


def _call(channel: grpc.Channel, endpoint: Endpoint, method: str, data: bytes) -> bytes:
    try:
        call: Any = channel.unary_unary(method)  # no serialisers: bytes in, bytes out
        answer: bytes = call(data, timeout=endpoint.timeout_s)
    except grpc.RpcError as exc:
        raise call_error(exc, endpoint) from exc
    return answer


def decode_answer(answer: bytes) -> Prediction:
    """Decode an encoded PredictResponse.

    Raises: RemoteProtocolError, DataError.
    """
    response = _parse(tf_messages.predict().PredictResponse, answer)
    spec = response.model_spec
    return Prediction(
        model=spec.name,
        version=spec.version.value,
        signature=spec.signature_name,
        outputs={
            name: read_tensor(response.outputs[name])
            for name in sorted(response.outputs)
        },
    )


def _parse(message_class: Any, data: bytes) -> Any:
    from google.protobuf.message import DecodeError

    try:
        return message_class.FromString(data)
    except DecodeError as exc:
        name = message_class.DESCRIPTOR.name
        raise RemoteProtocolError(f"the answer is not a {name}") from exc
