"""Classify and Regress without TensorFlow: what a model may answer, one row per refusal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tdxd.host import tf_messages
from tdxd.model_server.examples import classify, regress
from tdxd.model_server.failure import RpcFailure
from tdxd.model_server.registry import Servable

INVALID, PRECONDITION = "INVALID_ARGUMENT", "FAILED_PRECONDITION"
FLOAT, STRING = 1, 7


def signature(
    *outputs, inputs=("inputs",), method="predict", dtype=STRING, rank=1
) -> Any:
    made = tf_messages.meta_graph().SignatureDef(
        method_name=f"tensorflow/serving/{method}"
    )
    for alias in inputs:
        made.inputs[alias].dtype = dtype
        for _ in range(rank):
            made.inputs[alias].tensor_shape.dim.add().size = -1
    for alias in outputs:
        made.outputs[alias].dtype = FLOAT
    return made


def run(call, made, outputs, **options):
    """Call with two examples; `outputs` are what the model answers."""
    servable = Servable(
        signatures={"serving_default": made},
        runners={"serving_default": lambda _inputs: outputs},
    )
    if call is classify:
        messages = tf_messages.classification()
        request, result = (
            messages.ClassificationRequest(),
            messages.ClassificationResult(),
        )
    else:
        messages = tf_messages.regression()
        request, result = messages.RegressionRequest(), messages.RegressionResult()
    for _ in range(2):
        request.input.example_list.examples.add()
    call(servable, request, result, **options)
    return result


SCORES = np.array([[1, 2], [3, 4]], np.float32)
CLASSES = np.array([[b"a", b"b"], [b"c", b"d"]], object)
BOTH = signature("classes", "scores")
ONE = signature("outputs")
SHAPE = (
    "Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got "
)


@pytest.mark.parametrize(
    ("call", "made", "outputs", "code", "text"),
    [
        (
            classify,
            signature("scores", inputs=("a", "b")),
            {},
            INVALID,
            "Expected one input Tensor.",
        ),
        (
            classify,
            signature("a", "b", "c"),
            {},
            INVALID,
            "Expected one or two output Tensors, found 3",
        ),
        (
            classify,
            signature("scores", inputs=("x",)),
            {},
            PRECONDITION,
            "No classification inputs found in SignatureDef: inputs {",
        ),
        (
            classify,
            signature("x"),
            {},
            PRECONDITION,
            (
                "Expected classification signature outputs to contain at least one of "
                '"classes" or "scores". Signature was: '
            ),
        ),
        (
            classify,
            signature("scores", dtype=FLOAT),
            {},
            INVALID,
            "Expects arg[0] to be float but string is provided",
        ),
        (
            classify,
            signature("scores", rank=2),
            {},
            INVALID,
            "input tensor inputs has 1 dimensions, shape [2]; the signature has 2",
        ),
        (
            classify,
            signature("scores"),
            {"scores": SCORES[0]},
            INVALID,
            "Expected Tensor shape: [batch_size num_classes] but got [2]",
        ),
        (
            classify,
            BOTH,
            {"classes": SCORES, "scores": SCORES},
            INVALID,
            "Expected classes Tensor of DT_STRING. Got: DT_FLOAT",
        ),
        (
            classify,
            BOTH,
            {"classes": CLASSES, "scores": SCORES.astype(np.float64)},
            INVALID,
            "Expected scores Tensor of DT_FLOAT. Got: DT_DOUBLE",
        ),
        (
            classify,
            BOTH,
            {"classes": CLASSES[:1], "scores": SCORES},
            INVALID,
            "Expected classes output batch size of 2. Got: 1",
        ),
        (
            classify,
            BOTH,
            {"classes": CLASSES, "scores": SCORES[:, :1]},
            INVALID,
            "Tensors class and score should match in dim_size(1). Got 2 vs. 1",
        ),
        (regress, signature("a", "b"), {}, INVALID, "Expected one output Tensor."),
        (
            regress,
            signature("outputs", inputs=("x",)),
            {},
            PRECONDITION,
            "No regression inputs found in SignatureDef: inputs {",
        ),
        (
            regress,
            signature("x"),
            {},
            PRECONDITION,
            "No regression outputs found in SignatureDef: inputs {",
        ),
        (regress, ONE, {"outputs": SCORES}, INVALID, f"{SHAPE}[2,2]"),
        (
            regress,
            ONE,
            {"outputs": SCORES[:1, 0]},
            INVALID,
            "Input batch size did not match output batch size: 2 vs. 1",
        ),
        (
            regress,
            ONE,
            {"outputs": np.zeros(2)},
            INVALID,
            "Expected output Tensor of DT_FLOAT.  Got: DT_DOUBLE",
        ),
    ],
)
def test_refusals(call, made, outputs, code, text):
    with pytest.raises(RpcFailure) as caught:
        run(call, made, outputs)
    assert caught.value.code.name == code
    assert caught.value.text.startswith(text)


@pytest.mark.parametrize(
    ("call", "noun", "method"),
    [(classify, "classification", "classify"), (regress, "regression", "regress")],
)
def test_the_method_counts_only_where_it_is_asked_for(call, noun, method):
    made = signature("scores" if call is classify else "outputs")
    outputs = {"scores": SCORES, "outputs": SCORES[:, 0]}
    run(call, made, outputs)
    with pytest.raises(RpcFailure) as caught:
        run(call, made, outputs, check_method=True)
    assert caught.value.text == (
        f"Expected {noun} signature method_name to be tensorflow/serving/{method}. "
        "Was: tensorflow/serving/predict"
    )


def test_labels_alone():
    result = run(classify, signature("classes"), {"classes": CLASSES})
    assert [one.label for row in result.classifications for one in row.classes] == [
        *("a", "b", "c", "d")
    ]


def test_numbers_in_a_column():
    result = run(regress, ONE, {"outputs": SCORES[:, :1]})
    assert [one.value for one in result.regressions] == [1, 3]
