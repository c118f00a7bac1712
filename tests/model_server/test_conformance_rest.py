"""The REST API of tdx-model-server with real models: one row per documented behaviour."""

from __future__ import annotations

import base64
import math

import pytest

from tests.model_server.running import http

pytestmark = [pytest.mark.tensorflow, pytest.mark.slow]

MANY, FROZEN, EXAMPLES = "/v1/models/many", "/v1/models/frozen", "/v1/models/examples"
X = [[0, 1, 2, 3], [4, 5, 6, 7]]
Y = [[0.0, 3.0, 6.0, 9.0], [12.0, 15.0, 18.0, 21.0]]
TEXT = {"signature_name": "text", "inputs": ["ab", {"b64": "AP8="}]}
KINDS = {"int64": 1, "bool": True, "float16": 1.5, "complex64": 1, "uint8": 1}


def b64(data: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(data).decode()}


# Path, body, answer.
ANSWERS = [
    (f"{MANY}:predict", {"inputs": X}, {"outputs": {"y": Y, "total": 28.0}}),
    (f"{MANY}:predict", {"inputs": {"x": X}}, {"outputs": {"y": Y, "total": 28.0}}),
    (
        f"{MANY}/versions/1:predict",
        {"inputs": X[:1]},
        {"outputs": {"y": [[0.0, 2.0, 4.0, 6.0]], "total": 6.0}},
    ),
    (
        f"{MANY}/labels/stable:predict",
        {"inputs": X[:1]},
        {"outputs": {"y": [[0.0, 2.0, 4.0, 6.0]], "total": 6.0}},
    ),
    (
        f"{MANY}:predict",
        TEXT,
        {"outputs": {"length": [2, 2], "same": ["ab", {"b64": "AP8="}]}},
    ),
    (
        f"{FROZEN}:predict",
        {"instances": [[1, 2], [0.5, -1]]},
        {"predictions": [[2.0, 3.0], [1.5, 0.0]]},
    ),
    (
        "/V1/MODELS/frozen:PREDICT",
        {"instances": [{"input": [1, 2]}]},
        {"predictions": [[2.0, 3.0]]},
    ),
    (
        f"{MANY}:predict",
        {"signature_name": "text", "instances": ["a", "bc"]},
        {
            "predictions": [
                {"length": 1, "same": "a"},
                {"length": 2, "same": "bc"},
            ]
        },
    ),
    (
        f"{EXAMPLES}:classify",
        {"examples": [{"x": [0.25, 0.5]}, {"x": [1.0, 2.0], "t": "z"}]},
        {
            "results": [
                [["left", 0.25], ["right", 0.5]],
                [["left", 1.0], ["right", 2.0]],
            ]
        },
    ),
    (
        f"{EXAMPLES}:classify",
        {"signature_name": "scores", "examples": [{"x": [0.25, 0.5]}]},
        {"results": [[["", 0.25], ["", 0.5]]]},
    ),
    (
        f"{EXAMPLES}:regress",
        {
            "signature_name": "total",
            "context": {"x": [9.0, 9.0]},
            "examples": [{"x": [1.0, 2.5]}, {"t": b64(b"q")}],
        },
        {"results": [3.5, 18.0]},
    ),
]


@pytest.mark.parametrize(("path", "body", "want"), ANSWERS)
def test_answers(rest, path, body, want):
    assert http(rest, "POST", path, body) == (200, "application/json", want)


REFUSALS = [
    (f"{MANY}:predict", b"", 400, "JSON Parse error: The document is empty"),
    (f"{MANY}:predict", b"{", 400, "JSON Parse error: "),
    (f"{MANY}:predict", b"\xff", 400, "JSON Parse error: Invalid encoding in string."),
    (f"{MANY}:predict", [1], 400, "JSON Value: [\n    1\n] Is not object"),
    (f"{MANY}:predict", {}, 400, "Missing 'inputs' or 'instances' key"),
    (
        f"{MANY}:predict",
        {"signature_name": "x", "inputs": X},
        400,
        'Serving signature name: "x" not found in signature def',
    ),
    (
        f"{MANY}:predict",
        {"signature_name": "__saved_model_init_op", "inputs": X},
        400,
        "Failed to get input map for signature: __saved_model_init_op",
    ),
    ("/v1/models/u:predict", {"inputs": X}, 404, "Servable not found for request: "),
    (
        f"{MANY}/versions/9:predict",
        {"inputs": X},
        404,
        "Servable not found for request: Specific(many, 9)",
    ),
    (
        f"{MANY}/versions/99999999999999999999:predict",
        {"inputs": X},
        400,
        "Failed to convert version: 99999999999999999999 to numeric.",
    ),
    (
        f"{MANY}/labels/x:predict",
        {"inputs": X},
        400,
        "Unrecognized servable version label: x",
    ),
    (
        f"{MANY}:predict",
        {"instances": X},
        400,
        "Tensor name: total has no shape information ",
    ),
    (
        f"{MANY}:predict",
        {"signature_name": "kinds", "inputs": KINDS},
        501,
        "Conversion of JSON Value: 1 to type: complex64",
    ),
    (
        f"{MANY}:predict",
        {"signature_name": "kinds", "instances": [KINDS]},
        400,
        (
            "Failed to process element: 0 key: complex64 of 'instances' list. Error: "
            "UNIMPLEMENTED: Conversion of JSON Value: 1 to type: complex64"
        ),
    ),
    (
        f"{EXAMPLES}:classify",
        {"signature_name": "x", "examples": [{}]},
        400,
        "No signature was found with the name: x",
    ),
    (
        f"{EXAMPLES}:regress",
        {"signature_name": "wide", "examples": [{"x": [1.0, 2.0]}]},
        400,
        (
            "Expected output Tensor shape to be either [batch_size] or [batch_size, 1] "
            "but got [1,2]"
        ),
    ),
    (f"{EXAMPLES}:classify", {"examples": [{}]}, 400, ""),  # TensorFlow's own words
    ("/v1/models/many", {}, 400, "Malformed request: POST /v1/models/many"),
    ("/v1/models/many:guess", {}, 400, "Malformed request: POST /v1/models/many:guess"),
]


@pytest.mark.parametrize(("path", "body", "status", "words"), REFUSALS)
def test_refusals(rest, server, path, body, status, words):
    got, kind, answer = http(rest, "POST", path, body)
    assert (got, kind, list(answer)) == (status, "application/json", ["error"])
    assert answer["error"].startswith(words)
    assert server.process.poll() is None


@pytest.mark.parametrize(
    ("method", "path", "status", "error"),
    [
        ("GET", "/v1/models", 400, "Missing model name in request."),
        (
            "GET",
            "/v1/models/many:predict",
            400,
            "Malformed request: GET /v1/models/many",
        ),
        ("GET", "/v1/models/u", 404, "Could not find any versions of model u"),
        (
            "GET",
            "/v1/models/many/versions/9",
            404,
            "Could not find version 9 of model many",
        ),
        (
            "GET",
            "/v1/models/u/metadata",
            404,
            "Servable not found for request: Latest(u)",
        ),
        ("DELETE", "/v1/models/many", 400, "Malformed request: DELETE /v1/models/many"),
    ],
)
def test_other_refusals(rest, method, path, status, error):
    got, _kind, answer = http(rest, method, path)
    assert got == status
    assert answer["error"].startswith(error)


def test_what_is_not_the_api_is_not_found(rest):
    assert http(rest, "GET", "/")[0] == 404


def test_status(rest):
    one = {"state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    assert http(rest, "GET", MANY)[2] == {
        "model_version_status": [{"version": "12", **one}, {"version": "1", **one}]
    }
    only = http(rest, "GET", f"{MANY}/versions/1")[2]
    assert [each["version"] for each in only["model_version_status"]] == ["1"]


def test_metadata(rest):
    answer = http(rest, "GET", f"{MANY}/versions/1/metadata")[2]
    assert answer["model_spec"] == {
        "name": "many",
        "signature_name": "",
        "version": "1",
    }
    signature = answer["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert signature["method_name"] == "tensorflow/serving/predict"
    assert signature["inputs"]["x"]["dtype"] == "DT_FLOAT"
    sizes = [dim["size"] for dim in signature["inputs"]["x"]["tensor_shape"]["dim"]]
    assert sizes == ["-1", "4"]


def test_numbers_that_are_none(rest):
    body = b'{"instances": [[NaN, Infinity], [-Infinity, 1e-3]]}'
    rows = http(rest, "POST", f"{FROZEN}:predict", body)[2]["predictions"]
    assert math.isnan(rows[0][0])
    assert rows[0][1] == math.inf
    assert rows[1] == [-math.inf, 1.001]


def test_metrics(rest):
    before = metrics(rest)
    http(rest, "POST", f"{FROZEN}:predict", {"instances": [[1, 2]]})
    http(rest, "POST", f"{FROZEN}:predict", {})
    http(rest, "POST", "/v1/models/nobody:predict", {"instances": [[1, 2]]})
    after = metrics(rest)

    def more(name):
        return after[name] - before.get(name, 0)

    count = ":tensorflow:serving:request_count"
    assert more(f'{count}{{model_name="frozen",status="OK"}}') == 1
    assert more(f'{count}{{model_name="frozen",status="INVALID_ARGUMENT"}}') == 1
    assert more(f'{count}{{model_name="",status="NOT_FOUND"}}') == 1
    latency = ":tensorflow:serving:request_latency"
    labels = 'model_name="frozen",API="Predict",entrypoint="REST"'
    assert more(f"{latency}_count{{{labels}}}") == 1
    assert more(f'{latency}_bucket{{{labels},le="+Inf"}}') == 1
    assert more(f"{latency}_sum{{{labels}}}") > 0
    runtime = ":tensorflow:serving:runtime_latency"
    labels = 'model_name="frozen",API="Predict",runtime="TF1"'
    assert more(f"{runtime}_count{{{labels}}}") == 1


def metrics(rest) -> dict[str, float]:
    status, kind, text = http(rest, "GET", "/monitoring/prometheus/metrics")
    assert (status, kind) == (200, "text/plain")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {
        name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)
    }
