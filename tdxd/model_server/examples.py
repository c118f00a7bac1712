"""Classify and Regress calls: tf.Example messages in, labels with scores or numbers out.

Source of order, codes and texts: tensorflow_serving/servables/tensorflow/classifier.cc,
regressor.cc, util.cc (InputToSerializedExampleTensor).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import grpc
import numpy as np

from tdxd.core.tensors import DT_STRING, dtype_name, dtype_of
from tdxd.model_server.failure import RpcFailure
from tdxd.model_server.predict import DEFAULT_SIGNATURE, AroundRun, check_tensor
from tdxd.model_server.registry import Array, Servable

__all__ = ["classify", "regress"]

_INVALID = grpc.StatusCode.INVALID_ARGUMENT
_FLOAT = 1
_KINDS = {"classes": DT_STRING, "scores": _FLOAT}


def classify(
    servable: Servable,
    request: Any,
    result: Any,
    *,
    check_method: bool = False,
    around_run: AroundRun = contextlib.nullcontext,
) -> str:
    """Execute a ClassificationRequest, fill its result, return the signature's name.

    Raises: RpcFailure with TensorFlow Serving's codes and texts.
    """
    key, signature = _signature(
        servable, request, "classify", "classification", check=check_method
    )
    if len(signature.outputs) not in (1, 2):
        count = len(signature.outputs)
        text = f"Expected one or two output Tensors, found {count}"
        raise RpcFailure(_INVALID, text)
    _check_input(signature, "classification")
    names = [name for name in _KINDS if name in signature.outputs]
    if not names:
        raise RpcFailure(
            grpc.StatusCode.FAILED_PRECONDITION,
            "Expected classification signature outputs to contain at least one of "
            f'"classes" or "scores". Signature was: {signature}',
        )
    examples = _examples(request.input, signature)
    with around_run():
        outputs = servable.runners[key]({"inputs": examples})
    wanted = {name: outputs[name] for name in names}
    _check_classes(wanted, len(examples))
    _fill_classes(wanted, result)
    return key


def _fill_classes(outputs: Mapping[str, Array], result: Any) -> None:
    columns = {name: array.tolist() for name, array in outputs.items()}
    rows, width = next(iter(outputs.values())).shape
    for row in range(rows):
        made = result.classifications.add()
        for place in range(width):
            one = made.classes.add()
            if "classes" in columns:
                one.label = columns["classes"][row][place].decode("utf-8", "replace")
            if "scores" in columns:
                one.score = columns["scores"][row][place]


def regress(
    servable: Servable,
    request: Any,
    result: Any,
    *,
    check_method: bool = False,
    around_run: AroundRun = contextlib.nullcontext,
) -> str:
    """Execute a RegressionRequest, fill its result, return the signature's name.

    Raises: RpcFailure with TensorFlow Serving's codes and texts.
    """
    key, signature = _signature(
        servable, request, "regress", "regression", check=check_method
    )
    if len(signature.outputs) != 1:
        raise RpcFailure(_INVALID, "Expected one output Tensor.")
    _check_input(signature, "regression")
    if "outputs" not in signature.outputs:
        text = f"No regression outputs found in SignatureDef: {signature}"
        raise RpcFailure(grpc.StatusCode.FAILED_PRECONDITION, text)
    examples = _examples(request.input, signature)
    with around_run():
        output = servable.runners[key]({"inputs": examples})["outputs"]
    _check_numbers(output, len(examples))
    for value in output.reshape(-1).tolist():
        result.regressions.add().value = value
    return key


def _check_numbers(output: Array, count: int) -> None:
    if not (output.ndim == 1 or (output.ndim == 2 and output.shape[1] == 1)):
        raise RpcFailure(
            _INVALID,
            "Expected output Tensor shape to be either [batch_size] or "
            f"[batch_size, 1] but got {_shape(output)}",
        )
    if output.shape[0] != count:
        raise RpcFailure(
            _INVALID,
            "Input batch size did not match output batch size: "
            f"{count} vs. {output.shape[0]}",
        )
    if dtype_of(output) != _FLOAT:
        text = f"Expected output Tensor of DT_FLOAT.  Got: {_kind(output)}"
        raise RpcFailure(_INVALID, text)


def _signature(
    servable: Servable, request: Any, method: str, noun: str, *, check: bool
) -> tuple[str, Any]:
    key = request.model_spec.signature_name or DEFAULT_SIGNATURE
    signature = servable.signatures.get(key)
    if signature is None:
        raise RpcFailure(_INVALID, f"No signature was found with the name: {key}")
    wanted = f"tensorflow/serving/{method}"
    if check and signature.method_name != wanted:
        raise RpcFailure(
            _INVALID,
            f"Expected {noun} signature method_name to be {wanted}. "
            f"Was: {signature.method_name}",
        )
    if len(signature.inputs) != 1:
        raise RpcFailure(_INVALID, "Expected one input Tensor.")
    return key, signature


def _check_input(signature: Any, noun: str) -> None:
    if "inputs" not in signature.inputs:
        text = f"No {noun} inputs found in SignatureDef: {signature}"
        raise RpcFailure(grpc.StatusCode.FAILED_PRECONDITION, text)


def _examples(source: Any, signature: Any) -> Array:
    """Return each Example's bytes, with the context's before them if there is one."""
    kind = source.WhichOneof("kind")
    messages: list[Any] = list(getattr(source, kind).examples) if kind else []
    if not messages:
        raise RpcFailure(_INVALID, "Input is empty.")
    context = b""
    if kind == "example_list_with_context":
        # Two encoded messages in a row are their merged fields: the example's own come last.
        context = source.example_list_with_context.context.SerializeToString()
    examples = np.empty(len(messages), dtype=object)
    examples[:] = [context + message.SerializeToString() for message in messages]
    check_tensor(
        "inputs", signature.inputs["inputs"], DT_STRING, [len(examples)], index=0
    )
    return examples


def _check_classes(outputs: Mapping[str, Array], count: int) -> None:
    for name, output in outputs.items():
        if output.ndim != 2:
            raise RpcFailure(
                _INVALID,
                "Expected Tensor shape: [batch_size num_classes] but got "
                f"{_shape(output)}",
            )
        if dtype_of(output) != _KINDS[name]:
            kind = f"DT_{dtype_name(_KINDS[name]).upper()}"
            text = f"Expected {name} Tensor of {kind}. Got: {_kind(output)}"
            raise RpcFailure(_INVALID, text)
        if output.shape[0] != count:
            text = f"output batch size of {count}. Got: {output.shape[0]}"
            raise RpcFailure(_INVALID, f"Expected {name} {text}")
    widths = [output.shape[1] for output in outputs.values()]
    if len(set(widths)) != 1:
        raise RpcFailure(
            _INVALID,
            "Tensors class and score should match in dim_size(1). Got "
            f"{widths[0]} vs. {widths[1]}",
        )


def _shape(array: Array) -> str:
    return "[" + ",".join(map(str, array.shape)) + "]"


def _kind(array: Array) -> str:
    return f"DT_{dtype_name(dtype_of(array)).upper()}"
