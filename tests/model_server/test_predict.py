"""Requests against signatures, without TensorFlow: one row per documented refusal."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest

from tdxd.core.tensors import read_tensor, write_content
from tdxd.errors import ServeError
from tdxd.host import tf_messages
from tdxd.model_server.failure import RpcFailure, truncated
from tdxd.model_server.predict import answer_predict
from tdxd.model_server.registry import Registry, Servable, State, VersionState

try:
    messages: Any = tf_messages.predict()
except ServeError as exc:
    pytest.skip(exc.message, allow_module_level=True)

PREDICT = "tensorflow/serving/predict"
FLOAT, INT32 = 1, 3


def info(dtype, shape, name="feed:0"):
    made = tf_messages.meta_graph().TensorInfo(name=name, dtype=dtype)
    if shape is None:
        made.tensor_shape.unknown_rank = True
        return made
    made.tensor_shape.SetInParent()
    for size in shape:
        made.tensor_shape.dim.add().size = size
    return made


def signature(inputs, outputs=("y", "z"), method=PREDICT, defaults=None):
    made = tf_messages.meta_graph().SignatureDef(method_name=method)
    for alias, (dtype, shape) in inputs.items():
        made.inputs[alias].CopyFrom(info(dtype, shape))
    for alias in outputs:
        made.outputs[alias].CopyFrom(info(FLOAT, None))
    for alias, value in (defaults or {}).items():
        write_content(made.defaults[alias], value)
    return made


def double(inputs):
    total = sum(array.sum() for array in inputs.values())
    return {"y": np.float32(total * 2).reshape(()), "z": np.arange(3, dtype=np.int64)}


SIGNATURES = {
    "serving_default": signature({"x": (FLOAT, [-1, 4])}),
    "two": signature({"a": (FLOAT, None), "b": (INT32, [])}),
    "init": signature({}, method=""),
    "optional": signature(
        {"a": (FLOAT, []), "b": (FLOAT, [])}, defaults={"b": np.float32(5)}
    ),
}


@pytest.fixture
def registry():
    made = Registry({"m": {"stable": 3, "gone": 9}})
    servable = Servable(
        signatures=SIGNATURES, runners=dict.fromkeys(SIGNATURES, double)
    )
    for version in (3, 7):
        state = VersionState(version=version, state=State.AVAILABLE, servable=servable)
        made.put("m", state)
    made.put("m", VersionState(version=8, state=State.LOADING))
    return made


X = {"x": np.ones((2, 4), np.float32)}


def request_for(
    inputs=None, *, name="m", signature="", version=None, label="", want=()
):
    request = messages.PredictRequest(output_filter=want)
    request.model_spec.name = name
    request.model_spec.signature_name = signature
    if version is not None:
        request.model_spec.version.value = version
    if label:
        request.model_spec.version_label = label
    for alias, array in (X if inputs is None else inputs).items():
        write_content(request.inputs[alias], array)
    return request


def answer(registry, request, **options):
    response = messages.PredictResponse()
    answer_predict(registry, request, response, **options)
    return response


def test_the_answer_names_model_version_and_signature_and_fills_lists(registry):
    response = answer(registry, request_for())
    spec = response.model_spec
    assert (spec.name, spec.version.value) == ("m", 7)
    assert spec.signature_name == "serving_default"
    assert list(response.outputs["y"].float_val) == [16.0]
    assert list(response.outputs["z"].int64_val) == [0, 1, 2]
    assert not response.outputs["y"].tensor_content


def test_content_instead_of_lists_on_demand(registry):
    response = answer(registry, request_for(), with_content=True)
    assert not response.outputs["y"].float_val
    assert read_tensor(response.outputs["y"]) == 16.0


@pytest.mark.parametrize(
    ("options", "version"), [({}, 7), ({"version": 3}, 3), ({"label": "stable"}, 3)]
)
def test_the_version_asked_for_answers(registry, options, version):
    response = answer(registry, request_for(**options))
    assert response.model_spec.version.value == version


def test_the_output_filter_picks_outputs(registry):
    assert list(answer(registry, request_for(want=["z"])).outputs) == ["z"]


def test_an_input_left_out_takes_its_default(registry):
    request = request_for({"a": np.float32(1)}, signature="optional")
    assert answer(registry, request).outputs["y"].float_val == [12.0]


def test_a_name_of_unknown_rank_takes_any_rank(registry):
    inputs = {"a": np.ones((1, 2, 3), np.float32), "b": np.int32(1)}
    assert answer(registry, request_for(inputs, signature="two")).outputs["y"]


def no_spec():
    return messages.PredictRequest()


def wrong_bytes():
    request = request_for()
    request.inputs["x"].tensor_content = b"123"
    return request


REFUSALS = [
    (no_spec(), "INVALID_ARGUMENT", "Missing ModelSpec"),
    (request_for(name=""), "INVALID_ARGUMENT", "ModelSpec has no name specified."),
    (
        request_for(name="u"),
        "NOT_FOUND",
        "Servable not found for request: Latest(u)",
    ),
    (
        request_for(version=9),
        "NOT_FOUND",
        "Servable not found for request: Specific(m, 9)",
    ),
    (
        request_for(version=8),  # still loading
        "NOT_FOUND",
        "Servable not found for request: Specific(m, 8)",
    ),
    (
        request_for(label="gone"),
        "NOT_FOUND",
        "Servable not found for request: Specific(m, 9)",
    ),
    (
        request_for(label="x"),
        "INVALID_ARGUMENT",
        "Unrecognized servable version label: x",
    ),
    (
        request_for(signature="x"),
        "FAILED_PRECONDITION",
        'Serving signature key "x" not found.',
    ),
    (
        request_for(signature="init"),
        "INTERNAL",
        (
            "Expected prediction signature method_name to be one of "
            "{tensorflow/serving/predict, tensorflow/serving/classify, "
            "tensorflow/serving/regress}. Was: "
        ),
    ),
    (
        request_for({"a": np.float32(1)}, signature="two"),
        "INVALID_ARGUMENT",
        (
            "input size does not match signature: 1!=2 len({a}) != len({a,b}). "
            "Sent extra: {}. Missing but required: {b}."
        ),
    ),
    (
        request_for({**X, "q": np.float32(1)}),
        "INVALID_ARGUMENT",
        (
            "input size does not match signature: 2!=1 len({q,x}) != len({x}). "
            "Sent extra: {q}. Missing but required: {}."
        ),
    ),
    (
        request_for({"q": X["x"]}),
        "INVALID_ARGUMENT",
        (
            "Signature input alias: x(feed name: feed:0) not found in request and no default "
            "value provided. Inputs expected to be in the request {q}, or default input alias "
            "set: "
        ),
    ),
    (wrong_bytes(), "INVALID_ARGUMENT", "tensor parsing error: x"),
    (
        request_for({"x": np.ones((2, 4), np.int32)}),
        "INVALID_ARGUMENT",
        "Expects arg[0] to be float but int32 is provided",
    ),
    (
        request_for({"x": np.ones((2, 4, 1), np.float32)}),
        "INVALID_ARGUMENT",
        (
            "input tensor x has 3 dimensions, shape [2,4,1]; the signature has 2, "
            "shape [-1,4]"
        ),
    ),
    (
        request_for({"x": np.float32(1)}),
        "INVALID_ARGUMENT",
        "input tensor x has 0 dimensions, shape []; the signature has 2, shape [-1,4]",
    ),
    (
        request_for(want=["q"]),
        "INVALID_ARGUMENT",
        (
            "output tensor alias not found in signature: q Outputs expected to be in the set "
            "{y,z}."
        ),
    ),
    (
        request_for(want=["y", "y"]),
        "INVALID_ARGUMENT",
        "duplicate output tensor alias: y",
    ),
]


@pytest.mark.parametrize(
    ("request_message", "code", "text"), REFUSALS, ids=[row[2][:40] for row in REFUSALS]
)
def test_refusal(registry, request_message, code, text):
    with pytest.raises(RpcFailure) as caught:
        answer(registry, request_message)
    assert (caught.value.code, caught.value.text) == (grpc.StatusCode[code], text)


def test_a_refused_request_is_never_executed():
    def run(_inputs):
        pytest.fail("executed")

    registry = Registry({"m": {}})
    servable = Servable(signatures=SIGNATURES, runners=dict.fromkeys(SIGNATURES, run))
    registry.put("m", VersionState(version=1, state=State.AVAILABLE, servable=servable))
    for request, _code, _text in REFUSALS:
        with pytest.raises(RpcFailure):
            answer(registry, request)


def test_long_texts_are_cut():
    assert truncated("x" * 1024) == "x" * 1024
    assert truncated("x" * 1025) == "x" * 1024 + "...TRUNCATED"
