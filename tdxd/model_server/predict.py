"""One Predict call: check the request against the signature, execute, fill the response.

The element type and the rank of every input are checked before TensorFlow sees it: a tensor of
another rank can abort the whole process inside oneDNN. Fixed sizes are not checked, since
TensorFlow Serving does not either, and models answer for them.

Source of order, codes and texts: tensorflow_serving/servables/tensorflow/predict_util.cc,
tensorflow/cc/saved_model/util.cc, and FunctionCallFrame::SetArgs for the element type.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import grpc

from tdxd.core.tensors import dtype_name, read_tensor, write_content, write_values
from tdxd.errors import DataError
from tdxd.model_server.failure import RpcFailure
from tdxd.model_server.registry import Array, Registry, Servable

__all__ = [
    "DEFAULT_SIGNATURE",
    "AroundRun",
    "answer_predict",
    "check_tensor",
    "execute",
    "fill_model_spec",
]

DEFAULT_SIGNATURE = "serving_default"
_METHODS = tuple(
    f"tensorflow/serving/{name}" for name in ("predict", "classify", "regress")
)
_INVALID = grpc.StatusCode.INVALID_ARGUMENT
AroundRun = Callable[[], contextlib.AbstractContextManager[None]]
"""What is entered while TensorFlow executes: it takes the time."""


def answer_predict(
    registry: Registry,
    request: Any,
    response: Any,
    *,
    with_content: bool = False,
    around_run: AroundRun = contextlib.nullcontext,
) -> None:
    """Answer a PredictRequest by filling a PredictResponse.

    Raises: RpcFailure with TensorFlow Serving's codes and texts.
    """
    if not request.HasField("model_spec"):
        raise RpcFailure(_INVALID, "Missing ModelSpec")
    version, servable = registry.resolve(request.model_spec)
    key, outputs = execute(servable, request, around_run)
    fill_model_spec(response, request.model_spec.name, version, key)
    write = write_content if with_content else write_values
    for alias, value in outputs.items():
        write(response.outputs[alias], value)


def execute(
    servable: Servable, request: Any, around_run: AroundRun = contextlib.nullcontext
) -> tuple[str, Mapping[str, Array]]:
    """Execute a PredictRequest; return the signature's name and the outputs asked for.

    Raises: RpcFailure with TensorFlow Serving's codes and texts.
    """
    key = request.model_spec.signature_name or DEFAULT_SIGNATURE
    signature = servable.signatures.get(key)
    if signature is None:
        text = f'Serving signature key "{key}" not found.'
        raise RpcFailure(grpc.StatusCode.FAILED_PRECONDITION, text)
    _check_method(signature)
    inputs = _read_inputs(signature, request.inputs)
    aliases = _output_aliases(signature, request.output_filter)
    with around_run():
        outputs = servable.runners[key](inputs)
    return key, {alias: outputs[alias] for alias in aliases}


def fill_model_spec(response: Any, name: str, version: int, signature: str) -> None:
    """Say in the response which model, version and signature answered."""
    response.model_spec.name = name
    response.model_spec.version.value = version
    response.model_spec.signature_name = signature


def _check_method(signature: Any) -> None:
    if signature.method_name not in _METHODS:
        raise RpcFailure(
            grpc.StatusCode.INTERNAL,
            "Expected prediction signature method_name to be one of "
            f"{{{', '.join(_METHODS)}}}. Was: {signature.method_name}",
        )


def _read_inputs(signature: Any, sent: Mapping[str, Any]) -> dict[str, Array]:
    _check_count(signature, sent)
    inputs: dict[str, Array] = {}
    for alias, info in signature.inputs.items():
        message = sent.get(alias, signature.defaults.get(alias))
        if message is None:
            raise RpcFailure(
                _INVALID,
                f"Signature input alias: {alias}(feed name: {info.name}) not found in "
                "request and no default value provided. Inputs expected to be in the "
                f"request {{{_join(sent)}}}, or default input alias set: "
                f"{_join(signature.defaults)}",
            )
        try:
            inputs[alias] = read_tensor(message)
        except DataError as exc:
            text = f"tensor parsing error: {alias}"
            raise RpcFailure(_INVALID, text) from exc
        shape = [dim.size for dim in message.tensor_shape.dim]
        check_tensor(alias, info, message.dtype, shape, index=len(inputs) - 1)
    return inputs


def _check_count(signature: Any, sent: Mapping[str, Any]) -> None:
    wanted, got = len(signature.inputs), len(sent)
    if got > wanted or (got < wanted and not signature.defaults):
        extra = sent.keys() - signature.inputs.keys()
        missing = signature.inputs.keys() - sent.keys()
        raise RpcFailure(
            _INVALID,
            f"input size does not match signature: {got}!={wanted} "
            f"len({{{_join(sent)}}}) != len({{{_join(signature.inputs)}}}). "
            f"Sent extra: {{{_join(extra)}}}. "
            f"Missing but required: {{{_join(missing)}}}.",
        )


def check_tensor(
    alias: str, info: Any, dtype: int, shape: Sequence[int], *, index: int
) -> None:
    """Check an input's element type and rank against its TensorInfo.

    Raises: RpcFailure.
    """
    if dtype != info.dtype:
        raise RpcFailure(
            _INVALID,
            f"Expects arg[{index}] to be {dtype_name(info.dtype)} but "
            f"{dtype_name(dtype)} is provided",
        )
    if info.tensor_shape.unknown_rank:
        return
    wanted = [dim.size for dim in info.tensor_shape.dim]
    if len(wanted) != len(shape):
        raise RpcFailure(
            _INVALID,
            f"input tensor {alias} has {len(shape)} dimensions, shape {_shape(shape)}; "
            f"the signature has {len(wanted)}, shape {_shape(wanted)}",
        )


def _output_aliases(signature: Any, wanted: Iterable[str]) -> list[str]:
    aliases: list[str] = []
    for alias in wanted:
        if alias not in signature.outputs:
            raise RpcFailure(
                _INVALID,
                f"output tensor alias not found in signature: {alias} Outputs expected "
                f"to be in the set {{{_join(signature.outputs)}}}.",
            )
        if alias in aliases:
            raise RpcFailure(_INVALID, f"duplicate output tensor alias: {alias}")
        aliases.append(alias)
    return aliases or sorted(signature.outputs)


def _join(names: Iterable[str]) -> str:
    return ",".join(sorted(names))


def _shape(sizes: Iterable[int]) -> str:
    return "[" + ",".join(map(str, sizes)) + "]"
