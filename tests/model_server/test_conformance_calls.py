"""Classify, Regress, health, reload, batching with real models: one row per behaviour."""

from __future__ import annotations

import shutil
import signal
import socket
from concurrent import futures
from typing import Any

import grpc
import numpy as np
import pytest

from tdxd.host import tf_messages
from tdxd.model_server.health import HEALTH_SERVICE
from tdxd.model_server.small_messages import HealthCheckRequest, HealthCheckResponse
from tests.model_server.running import (
    Caller,
    http,
    predict_request,
    refusal,
    running_server,
)

pytestmark = [pytest.mark.tensorflow, pytest.mark.slow]

SERVING, NOT_SERVING = 1, 2
X = np.arange(8, dtype=np.float32).reshape(2, 4)
INVALID = "INVALID_ARGUMENT"
ABORTS = (
    'signature "serving_default": Conv2D Conv2D takes a tensor of any rank, and one of a '
    "wrong rank would end the server"
)


# --- Classify and Regress -----------------------------------------------------


def filled(request, *examples, signature="", name="examples", context=None):
    if name is not None:
        request.model_spec.name = name
        request.model_spec.signature_name = signature
    target = request.input.example_list
    if context is not None:
        target = request.input.example_list_with_context
        target.context.features.feature["x"].float_list.value[:] = context
    for values in examples:
        one = target.examples.add()
        if values:
            one.features.feature["x"].float_list.value[:] = values
    return request


def classification(*examples, **options):
    request = tf_messages.classification().ClassificationRequest()
    return filled(request, *examples, **options)


def regression(*examples, **options):
    request = tf_messages.regression().RegressionRequest()
    return filled(request, *examples, **options)


def test_classify(caller):
    response = caller.classify(classification([0.25, 0.5], [1, 2]))
    got = [
        [(one.label, one.score) for one in row.classes]
        for row in response.result.classifications
    ]
    assert got == [[("left", 0.25), ("right", 0.5)], [("left", 1), ("right", 2)]]
    spec = response.model_spec
    assert (spec.name, spec.version.value) == ("examples", 1)
    assert spec.signature_name == "serving_default"


def test_regress_with_a_context_that_examples_override(caller):
    request = regression([1, 2.5], [], signature="total", context=[9, 9])
    response = caller.regress(request)
    assert [one.value for one in response.result.regressions] == [3.5, 18]


@pytest.mark.parametrize(
    ("method", "request_", "code", "text"),
    [
        ("classify", classification(name=None), INVALID, "Missing ModelSpec"),
        ("regress", regression(name=None), INVALID, "Missing ModelSpec"),
        ("classify", classification(), INVALID, "Input is empty."),
        (
            "classify",
            classification([1], name="u"),
            "NOT_FOUND",
            "Servable not found for request: Latest(u)",
        ),
        (
            "classify",
            classification([1], signature="x"),
            INVALID,
            "No signature was found with the name: x",
        ),
        (
            "regress",
            regression([1], signature="x"),
            INVALID,
            "No signature was found with the name: x",
        ),
        ("regress", regression([1, 2]), INVALID, "Expected one output Tensor."),
        (
            "classify",
            classification([1, 2], name="many", signature="multiply"),
            INVALID,
            "Expected one input Tensor.",
        ),
        (
            "classify",
            classification([1, 2], name="many", signature="kinds"),
            INVALID,
            "Expected one input Tensor.",
        ),
        (
            "regress",
            regression([1, 2], signature="wide"),
            INVALID,
            (
                "Expected output Tensor shape to be either [batch_size] or "
                "[batch_size, 1] but got [1,2]"
            ),
        ),
    ],
)
def test_refusals(caller, server, method, request_, code, text):
    assert refusal(getattr(caller, method), request_) == (code, text)
    assert server.process.poll() is None


# --- health -------------------------------------------------------------------


@pytest.mark.parametrize(
    "service",
    [
        "",
        "PredictionService",
        "ModelService",
        tf_messages.PREDICTION_SERVICE,
        tf_messages.MODEL_SERVICE,
    ],
)
def test_everything_serves(caller, service):
    assert caller.health(service) == SERVING


def test_an_unknown_service(caller):
    assert refusal(caller.health, "x") == ("NOT_FOUND", "unknown service x")


class Watch:
    """A stream of a service's states."""

    def __init__(self, directory, service=""):
        options = [("grpc.default_authority", "localhost")]
        self.channel = grpc.insecure_channel(f"unix:{directory / 's'}", options=options)
        call: Any = self.channel.unary_stream(
            f"/{HEALTH_SERVICE}/Watch",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=HealthCheckResponse.FromString,
        )
        self.states = call(
            HealthCheckRequest(service=service), wait_for_ready=True, timeout=60
        )

    def next(self):
        return next(self.states).status


# --- reload -------------------------------------------------------------------


def config(*entries):
    made = [f'config {{ model_platform: "tensorflow" {entry} }}' for entry in entries]
    return f"model_config_list {{ {' '.join(made)} }}"


def entry(name, path, more=""):
    return f'name: "{name}" base_path: "{path}" {more}'


def test_reload_health_labels_and_the_end(models, tmp_path):
    """One server through its whole life: its steps are the rows."""
    base, file = tmp_path / "m", tmp_path / "models.config"
    base.mkdir()
    file.write_text(config(entry("m", base)))
    flags = (
        f"--model_config_file={file}",
        "--model_config_file_poll_wait_seconds=1",
        "--enable_grpc_healthcheck_service",
        "--max_num_load_retries=0",
        f"--rest_api_unix={tmp_path / 'rest'}",
    )
    with running_server(tmp_path, *flags) as running:
        watch = Watch(tmp_path)
        assert watch.next() == NOT_SERVING  # listens, but has no version yet
        caller = Caller(running.socket)
        assert caller.health(tf_messages.MODEL_SERVICE) == SERVING
        shutil.copytree(models / "frozen" / "1", tmp_path / "copy")
        (tmp_path / "copy").rename(base / "1")
        assert watch.next() == SERVING
        reloads(caller, watch, models, base, tmp_path)
        text = config(entry("file", models / "frozen"))
        file.write_text(text)
        running.wait_for("Successfully loaded servable version {name: file version: 1}")
        file.write_text("nonsense")
        running.wait_for("the models stay as they are")
        one = np.ones((1, 2), np.float32)
        assert caller.outputs("file", input=one)["predict"].tolist() == [[2, 2]]
        running.process.send_signal(signal.SIGTERM)
        assert watch.next() == NOT_SERVING
        with pytest.raises(StopIteration):
            watch.next()  # a watch does not hold up the end
        assert running.wait_until_ended() == 0
        assert not (tmp_path / "rest").exists()
        watch.channel.close()
        caller.close()


def reloads(caller, watch, models, base, tmp_path):
    for text, code, words in (
        (
            "custom_model_config {}",
            INVALID,
            (
                "ServerModelConfig type not supported by HandleReloadConfigRequest. "
                "Only ModelConfigList is currently supported"
            ),
        ),
        (
            config(entry("m", base), entry("m", base)),
            INVALID,
            "Illegal to list model m multiple times in config list",
        ),
        (
            config(entry("m", "relative")),
            INVALID,
            (
                "Expected model m to have an absolute path or URI; got "
                "base_path()=relative"
            ),
        ),
        (
            f"model_config_list {{ config {{ {entry('m', base)} }} }}",
            INVALID,
            (
                "Illegal setting neither ModelServerConfig::model_type (deprecated) nor "
                "ModelServerConfig::model_platform."
            ),
        ),
        (
            config(entry("m", base, 'version_labels { key: "l" value: 2 }')),
            "FAILED_PRECONDITION",
            (
                "Request to assign label to version 2 of model m, which is not "
                "currently available for inference"
            ),
        ),
        (
            config(entry("m", base), entry("n", tmp_path / "none")),
            "NOT_FOUND",
            (
                f"Could not find base path {tmp_path / 'none'} for servable n with "
                "error No such file or directory"
            ),
        ),
    ):
        assert refusal(caller.reload, text) == (code, words)
    for model, words in (("bad", "DecodeError: "), ("open", ABORTS)):
        code, text = refusal(
            caller.reload, config(entry("m", base), entry(model, models / model))
        )
        assert code == "UNKNOWN"
        assert text.startswith("1 model(s) did not become available: ")
        assert f"{{name: {model} version: 1}} due to error: {words}" in text
    assert watch.next() == NOT_SERVING  # the models asked for are not all there
    label = 'version_labels { key: "stable" value: 1 }'
    caller.reload(config(entry("m", base, label), entry("new", models / "many")))
    assert watch.next() == SERVING
    assert caller.outputs("new", x=X)["y"][0, 1] == 3.0
    request = predict_request("m", input=np.ones((1, 2), np.float32))
    request.model_spec.version_label = "stable"
    assert caller.predict(request).model_spec.version.value == 1
    caller.reload(config(entry("m", base)))
    assert caller.states("new")[12][0] == 50
    assert refusal(caller.outputs, "new", x=X)[0] == "NOT_FOUND"


# --- batching, and the REST API on a port --------------------------------------


def test_requests_at_the_same_time_share_an_execution(models, tmp_path):
    """The batch waits until it is full: were one left alone, nobody would be answered."""
    parameters = tmp_path / "batching"
    parameters.write_text(
        "max_batch_size { value: 6 } batch_timeout_micros { value: 50000000 } "
        "num_batch_threads { value: 1 } max_enqueued_batches { value: 2 }"
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    flags = (
        f"--model_base_path={models / 'frozen'}",
        "--model_name=m",
        "--enable_batching",
        f"--batching_parameters_file={parameters}",
        f"--rest_api_port={port}",
    )
    with running_server(tmp_path, *flags) as running:
        running.wait_for("Running gRPC ModelServer")
        caller = Caller(running.socket)
        caller.ready()
        with futures.ThreadPoolExecutor(3) as pool:
            rows = [np.full((2, 2), number, np.float32) for number in range(3)]
            calls = [pool.submit(caller.outputs, "m", input=row) for row in rows[:2]]
            body = {"instances": rows[2].tolist()}
            path = "/v1/models/m:predict"
            last = pool.submit(http, port, "POST", path, body)
            for row, call in zip(rows, calls, strict=False):
                assert np.array_equal(call.result()["predict"], row + 1)
            assert last.result()[2] == {"predictions": [[3.0, 3.0], [3.0, 3.0]]}
        code, text = refusal(caller.outputs, "m", input=np.ones((7, 2), np.float32))
        assert (code, text) == (
            INVALID,
            "Task size 7 is larger than maximum input batch size 6",
        )
        drained_with_a_call_in_progress(running, caller)


def drained_with_a_call_in_progress(running, caller):
    """A call that waits for others to fill its batch is answered at once when the server ends."""
    call = caller.start("m", input=np.ones((3, 2), np.float32))
    caller.states("m")  # on the same connection: the call before it has arrived
    assert not call.done()
    running.process.send_signal(signal.SIGTERM)
    assert running.wait_until_ended() == 0
    assert list(call.result().outputs["predict"].float_val) == [2] * 6
    caller.close()
