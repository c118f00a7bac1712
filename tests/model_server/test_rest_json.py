"""JSON of the REST API, without a server: one row per documented form and refusal."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.host import tf_messages
from tdxd.model_server.failure import RpcFailure
from tdxd.model_server.json_values import parse_body
from tdxd.model_server.rest_examples import fill_examples
from tdxd.model_server.rest_request import read_tensors
from tdxd.model_server.rest_response import (
    classifications_json,
    columns_json,
    error_json,
    regressions_json,
    rows_json,
)

FLOAT, DOUBLE, INT32, UINT8, STRING, INT64, BOOL, HALF, UINT64 = (
    *(1, 2, 3, 4, 7),
    *(9, 10, 19, 23),
)


def refused(call, *arguments) -> str:
    with pytest.raises(RpcFailure) as caught:
        call(*arguments)
    assert caught.value.code.name == "INVALID_ARGUMENT"
    return caught.value.text


# --- requests: values -----------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value", "want"),
    [
        (FLOAT, 1, np.float32(1)),
        (FLOAT, [[1, 2.5], [3, -4]], np.array([[1, 2.5], [3, -4]], np.float32)),
        (FLOAT, [], np.empty(0, np.float32)),
        (FLOAT, [[], []], np.empty((2, 0), np.float32)),
        (FLOAT, 16777215, np.float32(16777215)),
        (DOUBLE, 1e300, np.float64(1e300)),
        (HALF, [0.5], np.array([0.5], np.float16)),
        (INT32, [-(2**31), 2**31 - 1], np.array([-(2**31), 2**31 - 1], np.int32)),
        (UINT8, [0, 255], np.array([0, 255], np.uint8)),
        (INT64, 2**63 - 1, np.int64(2**63 - 1)),
        (UINT64, 2**64 - 1, np.uint64(2**64 - 1)),
        (BOOL, [True, False], np.array([True, False])),
        (STRING, ["a", {"b64": "AP8="}], np.array([b"a", b"\0\xff"], object)),
        (STRING, {"b64": "YQ=="}, np.array(b"a", object)),
    ],
)
def test_a_column(kind, value, want):
    form, made = read_tensors({"inputs": value}, {"x": kind})
    assert form == "column"
    assert made["x"].dtype == want.dtype
    assert made["x"].shape == want.shape
    assert made["x"].tolist() == want.tolist()


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        (FLOAT, "a", 'JSON Value: "a" Type: String is not of expected type: float'),
        (FLOAT, True, "JSON Value: true Type: True is not of expected type: float"),
        (FLOAT, None, "JSON Value: null Type: Null is not of expected type: float"),
        (INT32, 1.0, "JSON Value: 1.0 Type: Number is not of expected type: int32"),
        (
            INT32,
            2**31,
            "JSON Value: 2147483648 Type: Number is not of expected type: int32",
        ),
        (UINT8, -1, "JSON Value: -1 Type: Number is not of expected type: uint8"),
        (BOOL, 1, "JSON Value: 1 Type: Number is not of expected type: bool"),
        (STRING, 1, "JSON Value: 1 Type: Number is not of expected type: string"),
        (STRING, {"b64": "?"}, "Unable to base64 decode"),
        (
            FLOAT,
            16777216,
            "Cannot convert JSON value: 16777216 to float without loss of precision.",
        ),
        (
            FLOAT,
            1e39,
            "Cannot convert JSON value: 1e+39 to float without loss of precision.",
        ),
        (
            FLOAT,
            [[1], 2],
            "JSON Value: 2 found at incorrect level: 2 in the JSON DOM. Exp",
        ),
        (FLOAT, [1, [2]], "Encountered list at unexpected level: 1 expected < 1"),
        (
            FLOAT,
            [[1, 2], [3]],
            "Encountered list at unexpected size: 1 at level: 1 expected size: 2",
        ),
        (FLOAT, [[1], [[2]]], "Encountered list at unexpected level: 2 expected < 2"),
    ],
)
def test_values_refused(kind, value, text):
    got = refused(read_tensors, {"inputs": value}, {"x": kind})
    assert got.startswith(text)


def test_numbers_without_bounds_are_refused_and_not_rounded():
    text = refused(read_tensors, {"inputs": 10**400}, {"x": DOUBLE})
    assert text.endswith("to double without loss of precision.")


# --- requests: forms --------------------------------------------------------------

TWO = {"a": FLOAT, "b": STRING}


def test_rows_of_objects():
    rows = [{"a": [1, 2], "b": "x"}, {"b": "y", "a": [3, 4]}]
    form, made = read_tensors({"instances": rows}, TWO)
    assert form == "row"
    assert made["a"].tolist() == [[1, 2], [3, 4]]
    assert made["b"].tolist() == [b"x", b"y"]


def test_plain_rows_of_bytes():
    rows = [{"b64": "YQ=="}, {"b64": "Yg=="}]
    made = read_tensors({"instances": rows}, {"x": STRING})[1]
    assert made["x"].tolist() == [b"a", b"b"]


FAILED_ELEMENT = "Failed to process element: "


@pytest.mark.parametrize(
    ("document", "kinds", "text"),
    [
        ({}, TWO, "Missing 'inputs' or 'instances' key"),
        (
            {"inputs": 1, "instances": [1]},
            TWO,
            (
                'JSON Value: {\n    "inputs": 1,\n    "instances": [\n        1\n    ]\n} '
                "Not formatted correctly expecting only one of 'inputs' or 'instances' "
                "keys to exist "
            ),
        ),
        (
            {"instances": 1},
            TWO,
            "JSON Value: {\n    \"instances\": 1\n} Excepting 'instances' to be an list/array",
        ),
        (
            {"instances": []},
            TWO,
            "JSON Value: {\n    \"instances\": []\n} No values in 'instances' array",
        ),
        (
            {"instances": [1]},
            TWO,
            (
                "instances is a plain list, but expecting list of objects as multiple "
                "input tensors required as per tensorinfo_map"
            ),
        ),
        (
            {"inputs": [1]},
            TWO,
            (
                "inputs is a plain value/list, but expecting an object as multiple input "
                "tensors required as per tensorinfo_map"
            ),
        ),
        ({"inputs": {"a": 1}}, TWO, "Missing named input: b in 'inputs' object."),
        (
            {"instances": [{"x": 1}, 2]},
            {"x": FLOAT},
            "Expecting object but got list at item 1 of input list",
        ),
        (
            {"instances": [1, {"x": 1}]},
            {"x": FLOAT},
            "Expecting value/list but got object at item 1 of input list",
        ),
        (
            {"instances": [{"a": 1}]},
            TWO,
            (
                "Failed to process element: 0 of 'instances' list. JSON object: "
                '{\n    "a": 1\n} keys must be equal to: a,b'
            ),
        ),
        (
            {"instances": [{"a": 1, "z": 1}]},
            TWO,
            (
                "Failed to process element: 0 key: z of 'instances' list. Error: "
                "INVALID_ARGUMENT: JSON object: does not have named input: z"
            ),
        ),
        (
            {"instances": [[1], [2, 3]]},
            {"x": FLOAT},
            (
                "Failed to process element: 1 of 'instances' list. Error: "
                "INVALID_ARGUMENT: Expecting tensor size: 1 but got: 2"
            ),
        ),
        (
            {"instances": [[[1, 2]], [[1], [2]]]},
            {"x": FLOAT},
            (
                "Failed to process element: 1 of 'instances' list. Error: "
                "INVALID_ARGUMENT: Expecting shape [1,2] but got: [2,1]"
            ),
        ),
        (
            {"instances": [{"x": 1}, {"x": "q"}]},
            {"x": FLOAT},
            (
                "Failed to process element: 1 key: x of 'instances' list. Error: "
                'INVALID_ARGUMENT: JSON Value: "q" Type: String is not of expected type: '
                "float"
            ),
        ),
    ],
)
def test_forms_refused(document, kinds, text):
    assert refused(read_tensors, document, kinds) == text


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "JSON Parse error: The document is empty"),
        (b'{"a": ', "JSON Parse error: Expecting value at offset: 6"),
        (b'"\xff"', "JSON Parse error: Invalid encoding in string. at offset: 1"),
        (b"1", "JSON Value: 1 Is not object"),
        (b"[" * 100_000, "JSON Parse error: "),
        (b"[" * 2_000_001, "JSON Parse error: more than 2000000 lists and objects"),
        (b'{"a": ' + b"9" * 5000 + b"}", "JSON Parse error: "),
    ],
)
def test_bodies_refused(body, words):
    assert refused(parse_body, body).startswith(words)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "b64"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(
    st.fixed_dictionaries({}, optional={"inputs": values, "instances": values}),
    st.dictionaries(
        st.sampled_from(["a", "b"]), st.integers(1, 23), min_size=1, max_size=2
    ),
)
def test_whatever_is_sent_is_taken_or_refused(document, kinds):
    """Nothing but a refusal comes out, and what is taken has one array for each input."""
    try:
        _form, made = read_tensors(document, kinds)
    except RpcFailure:
        return
    assert made.keys() == kinds.keys()


# --- Classify and Regress -----------------------------------------------------------


def examples(document) -> Any:
    request = tf_messages.classification().ClassificationRequest()
    fill_examples(document, request.input)
    return request.input


def test_features_of_every_kind():
    made = examples(
        {"examples": [{"i": [1, True], "f": 1.5, "t": ["a", {"b64": "AP8="}], "e": []}]}
    )
    feature = made.example_list.examples[0].features.feature
    assert list(feature["i"].int64_list.value) == [1, 1]
    assert list(feature["f"].float_list.value) == [1.5]
    assert list(feature["t"].bytes_list.value) == [b"a", b"\0\xff"]
    assert feature["e"].WhichOneof("kind") is None


def test_a_context():
    made = examples({"context": {"c": 1}, "examples": [{}, {"x": 2}]})
    listed = made.example_list_with_context
    assert list(listed.context.features.feature["c"].int64_list.value) == [1]
    assert len(listed.examples) == 2


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({}, "JSON Value: {} When method is classify, key 'examples' is expected and"),
        (
            {"examples": 1},
            "JSON Value: {\n    \"examples\": 1\n} Expecting 'examples' value",
        ),
        (
            {"examples": []},
            "JSON Value: {\n    \"examples\": []\n} 'examples' value is an emp",
        ),
        ({"examples": [1]}, "Example must be JSON object but got JSON Number"),
        (
            {"examples": [{"x": None}]},
            "Feature: x has element with unexpected JSON type: Null",
        ),
        (
            {"examples": [{"x": [[1]]}]},
            "Feature: x has element with unexpected JSON type: Array",
        ),
        (
            {"examples": [{"x": [1, "a"]}]},
            "Unexpected element type in feature: x expecting type: int64",
        ),
        (
            {"examples": [{"x": 2**63}]},
            "Feature: x has uint64 element. Only int64 is supported.",
        ),
        (
            {"examples": [{"x": 1e39}]},
            "Cannot convert JSON value: 1e+39 to float without",
        ),
    ],
)
def test_examples_refused(document, words):
    assert refused(examples, document).startswith(words)


# --- answers --------------------------------------------------------------------


def test_rows_with_names_and_bytes():
    outputs = {
        "x": np.array([[1.5, 2], [0.1, 1e20]], np.float32),
        "raw_bytes": np.array([b"a", b"b"], object),
    }
    assert json.loads(rows_json(outputs)) == {
        "predictions": [
            {"x": [1.5, 2.0], "raw_bytes": {"b64": "YQ=="}},
            {"x": [0.1, 1e20], "raw_bytes": {"b64": "Yg=="}},
        ]
    }


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.float32(2), "2.0"),
        (np.array([0.1, np.nan, -np.inf], np.float32), "[0.1, NaN, -Infinity]"),
        (np.array([0.1], np.float64), "[0.1]"),
        (np.array([0.5], np.float16), "[0.5]"),
        (np.array([[1], [2]], np.int64), "[[1], [2]]"),
        (np.array([True]), "[true]"),
        (np.empty((2, 0), np.float32), "[[], []]"),
        (np.empty((0, 2), np.float32), "[]"),
        (np.array(["grün".encode()], object), '["grün"]'),
        (np.array([b"\xff"], object), '[{"b64": "/w=="}]'),
    ],
)
def test_one_column_has_no_name(array, text):
    array = np.asarray(array)
    assert columns_json({"x": array}).decode() == f'{{\n    "outputs": {text}\n}}'


@pytest.mark.parametrize(
    ("outputs", "text"),
    [
        ({"x": np.array(1.0)}, "Tensor name: x has no shape information "),
        (
            {"x": np.zeros(2), "y": np.zeros(3)},
            "Tensor name: y has inconsistent batch size: 3 expecting: 2",
        ),
        (
            {"x": np.zeros(2, np.complex64)},
            "Failed to write JSON value for tensor type: complex64",
        ),
    ],
)
def test_outputs_that_are_no_rows(outputs, text):
    assert refused(rows_json, outputs) == text


@given(st.lists(st.floats(width=32), max_size=20))
def test_a_float_reads_back_as_the_same(numbers):
    array = np.array(numbers, np.float32)
    back = json.loads(rows_json({"x": array}))["predictions"]
    assert np.array_equal(np.array(back, np.float32), array, equal_nan=True)


def test_results():
    result = tf_messages.classification().ClassificationResult()
    one = result.classifications.add().classes.add()
    one.label, one.score = 'a"', 0.1
    want = {"results": [[['a"', 0.1]]]}
    assert json.loads(classifications_json(result)) == want
    numbers = tf_messages.regression().RegressionResult()
    numbers.regressions.add().value = 3
    assert regressions_json(numbers) == b'{\n    "results": [3.0]\n}'


def test_an_error_is_pretty():
    assert error_json('a "b"') == b'{\n    "error": "a \\"b\\""\n}'
