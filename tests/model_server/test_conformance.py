"""tdx-model-server with real models: one row per documented behaviour of TensorFlow Serving.

What a request is refused for before anything executes is in test_predict.py, without TensorFlow.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tdxd.host import tf_messages
from tests.model_server.running import (
    ROOT,
    Caller,
    predict_request,
    refusal,
    running_server,
    server_command,
)

pytestmark = [pytest.mark.tensorflow, pytest.mark.slow]

LOADING, AVAILABLE, END = 20, 30, 50
X = np.arange(8, dtype=np.float32).reshape(2, 4)

# --- Predict ------------------------------------------------------------------


def test_the_highest_version_answers_and_fills_lists(caller):
    response = caller.predict(predict_request("many", x=X))
    spec = response.model_spec
    assert (spec.name, spec.version.value) == ("many", 12)
    assert spec.signature_name == "serving_default"
    assert list(response.outputs["y"].float_val) == (X * 3).reshape(-1).tolist()
    assert list(response.outputs["total"].float_val) == [28.0]
    assert not response.outputs["y"].tensor_content


def test_a_version_by_number_and_by_label(caller):
    for choose in ({"version": 1}, {"label": "stable"}):
        request = predict_request("many", x=X)
        if "label" in choose:
            request.model_spec.version_label = choose["label"]
        else:
            request.model_spec.version.value = choose["version"]
        response = caller.predict(request)
        assert response.model_spec.version.value == 1
        assert response.outputs["y"].float_val[1] == 2.0


def test_several_models_and_a_model_of_tensorflow_1(caller):
    got = caller.outputs("frozen", input=np.ones((1, 2), np.float32))
    assert got["predict"].tolist() == [[2.0, 2.0]]


def test_strings_keep_every_byte(caller):
    sent = np.array([b"ab\0", b"", "grün".encode()], object)
    got = caller.outputs("many", "text", t=sent)
    assert got["same"].tolist() == sent.tolist()
    assert got["length"].tolist() == [3, 0, 5]


def test_no_strings_at_all(caller):
    got = caller.outputs("many", "text", t=np.empty(0, object))
    assert got["length"].shape == (0,)


def test_every_kind_of_element(caller):
    sent = {
        "int64": np.array([2**62, -1]),
        "bool": np.array([True, False]),
        "float16": np.array([1.5, 65504], np.float16),
        "complex64": np.array([1 + 2j, 0], np.complex64),
        "uint8": np.array([0, 255], np.uint8),
    }
    got = caller.outputs("many", "kinds", **sent)
    for name, array in sent.items():
        assert got[f"same_{name}"].dtype == array.dtype
        assert got[f"same_{name}"].tolist() == array.tolist()


def test_the_output_filter(caller):
    request = predict_request("many", x=X)
    request.output_filter.append("total")
    assert list(caller.predict(request).outputs) == ["total"]


def test_fixed_sizes_are_left_to_the_model(caller):
    small = np.ones((1, 2, 2, 3), np.float32)
    assert caller.outputs("many", "picture", i=small)["o"].shape == (1, 2, 2, 2)


@pytest.mark.parametrize(
    ("signature", "inputs", "code", "words"),
    [
        (
            "picture",
            {"i": np.float32(1)},
            "INVALID_ARGUMENT",
            "input tensor i has 0 dimensions, shape []; the signature has 4",
        ),
        (
            "picture",
            {"i": np.ones((8, 8, 3), np.float32)},
            "INVALID_ARGUMENT",
            "input tensor i has 3 dimensions, shape [8,8,3]; the signature has 4",
        ),
        (
            "picture",
            {"i": np.ones((1, 8, 8, 3), np.int32)},
            "INVALID_ARGUMENT",
            "Expects arg[0] to be float but int32 is provided",
        ),
        (
            "picture",
            {"i": np.ones((1, 8, 8, 4), np.float32)},
            "INVALID_ARGUMENT",
            "input depth must be evenly divisible by filter depth: 4 vs 3",
        ),
        (
            "multiply",
            {"a": np.ones((2, 3), np.float32), "b": np.ones((2, 3), np.float32)},
            "INVALID_ARGUMENT",
            "Matrix size-incompatible: In[0]: [2,3], In[1]: [2,3]",
        ),
        (
            "nope",
            {},
            "FAILED_PRECONDITION",
            'Serving signature key "nope" not found.',
        ),
        (
            "__saved_model_init_op",
            {},
            "INTERNAL",
            "Expected prediction signature method_name to be one of",
        ),
    ],
)
def test_a_bad_request_is_refused_and_the_process_lives(
    caller, server, signature, inputs, code, words
):
    got_code, text = refusal(caller.outputs, "many", signature, **inputs)
    assert (got_code, text[: len(words)]) == (code, words)
    assert server.process.poll() is None
    assert caller.outputs("many", x=X)["total"] == 28.0


def test_unknown_methods_are_unimplemented(caller):
    call = caller._channel.unary_unary("/tensorflow.serving.ModelService/Nope")
    assert refusal(call, b"")[0] == "UNIMPLEMENTED"


def test_bytes_that_are_no_message_are_refused_and_the_process_lives(caller, server):
    call = caller._channel.unary_unary(tf_messages.PREDICT_METHOD)
    assert refusal(call, b"\xff\xff")[0] == "INTERNAL"
    assert server.process.poll() is None


# --- GetModelMetadata ---------------------------------------------------------


def metadata_request(*fields, name="many"):
    messages = tf_messages.model_metadata()
    request = messages.GetModelMetadataRequest(metadata_field=fields)
    if name is not None:
        request.model_spec.name = name
    return request


def test_metadata_holds_the_signatures_as_saved(caller):
    response = caller.metadata(metadata_request("signature_def"))
    assert response.model_spec.version.value == 12
    signatures = tf_messages.model_metadata().SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(signatures)
    found = signatures.signature_def
    assert set(found) == {
        "serving_default",
        "text",
        "picture",
        "multiply",
        "kinds",
        "wait",
        "__saved_model_init_op",
    }
    x = found["serving_default"].inputs["x"]
    assert x.name == "serving_default_x:0"
    assert [dim.size for dim in x.tensor_shape.dim] == [-1, 4]
    assert found["serving_default"].method_name == "tensorflow/serving/predict"


@pytest.mark.parametrize(
    ("make", "code", "text"),
    [
        (
            lambda: metadata_request("signature_def", name=None),
            "INVALID_ARGUMENT",
            "Missing ModelSpec",
        ),
        (
            metadata_request,
            "INVALID_ARGUMENT",
            "GetModelMetadataRequest must specify at least one metadata_field",
        ),
        (
            lambda: metadata_request("x"),
            "INVALID_ARGUMENT",
            "Metadata field x is not supported",
        ),
        (
            lambda: metadata_request("signature_def", name="u"),
            "NOT_FOUND",
            "Servable not found for request: Latest(u)",
        ),
    ],
)
def test_metadata_refusals(caller, make, code, text):
    assert refusal(caller.metadata, make()) == (code, text)


# --- GetModelStatus -----------------------------------------------------------


def test_status_of_all_versions_the_highest_first(caller):
    assert list(caller.states("many").items()) == [
        (12, (AVAILABLE, 0, "")),
        (1, (AVAILABLE, 0, "")),
    ]


@pytest.mark.parametrize(
    ("name", "version", "code", "text"),
    [
        (None, None, "INVALID_ARGUMENT", "Missing ModelSpec"),
        ("u", None, "NOT_FOUND", "Could not find any versions of model u"),
        ("many", 9, "NOT_FOUND", "Could not find version 9 of model many"),
    ],
)
def test_status_refusals(caller, name, version, code, text):
    request = tf_messages.model_status().GetModelStatusRequest()
    if name is not None:
        request.model_spec.name = name
    if version is not None:
        request.model_spec.version.value = version
    assert refusal(caller.status, request) == (code, text)


# --- the life of a server -----------------------------------------------------


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("bad", "Error parsing message"),
        (
            "nopb",
            "Could not find SavedModel .pb or .pbtxt at supplied export directory path: ",
        ),
        (
            "untagged",
            "Could not find meta graph def matching supplied tags: { serve }. To inspect",
        ),
        ("cut", "variables"),
    ],
)
def test_a_model_that_cannot_be_loaded_ends_the_start(models, tmp_path, model, words):
    flags = [
        f"--model_base_path={models / model}",
        "--model_name=m",
        "--max_num_load_retries=1",
        "--load_retry_interval_micros=200000",
    ]
    with running_server(tmp_path, *flags) as running:
        assert running.wait_until_ended() == 255
        log = running.log()
    assert log.count("Loading servable: {name: m version: 1} failed: ") == 2
    assert words in log
    assert (
        "tdx-model-server: error: Failed to start server. Error: Unknown: 1 servable(s) "
        "did not become available: {{{name: m version: 1} due to error: " in log
    )
    assert "Traceback" not in log


def test_a_model_without_a_version_waits_and_status_says_so(models, tmp_path):
    flags = [f"--model_base_path={models / 'empty'}", "--model_name=m"]
    with running_server(tmp_path, *flags) as running:
        running.wait_for("No versions of servable m found under base path")
        caller = Caller(running.socket)
        caller.ready()
        assert refusal(caller.states, "m") == (
            "NOT_FOUND",
            "Could not find any versions of model m",
        )
        caller.close()
        assert running.process.poll() is None
        running.process.terminate()
        assert running.wait_until_ended() == 0


def test_new_old_bad_and_returning_versions(models, tmp_path):
    base = tmp_path / "m"
    base.mkdir()
    shutil.copytree(models / "many" / "1", base / "1")
    flags = [
        f"--model_base_path={base}",
        "--model_name=m",
        "--max_num_load_retries=0",
    ]
    with running_server(tmp_path, *flags) as running:
        running.wait_for("Running gRPC ModelServer")
        caller = Caller(running.socket)
        assert caller.outputs("m", x=X)["y"][0, 1] == 2.0
        shutil.copytree(models / "many" / "12", base / ".tmp-2")
        (base / ".tmp-2").rename(base / "2")
        running.wait_for("Unloaded servable version {name: m version: 1}")
        assert caller.outputs("m", x=X)["y"][0, 1] == 3.0
        shutil.copytree(models / "bad" / "1", base / "3")
        running.wait_for("Servable {name: m version: 3} cannot be loaded: ")
        states = caller.states("m")
        assert (states[3][0], states[2][0], states[1][0]) == (END, AVAILABLE, END)
        assert states[3][1] != 0
        assert "Error parsing message" in states[3][2]
        assert caller.outputs("m", x=X)["y"][0, 1] == 3.0
        caller.close()


class LongCall:
    """A call to the model `wait`, in a thread, which lasts until `let_end`."""

    def __init__(self, caller: Caller, gate: Path) -> None:
        self._caller, self._gate = caller, gate
        self._opened: list[bool] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        started = Path(f"{gate}.started")
        deadline = time.monotonic() + 60
        while not started.exists():
            assert time.monotonic() < deadline, "the call never began to compute"
            time.sleep(0.01)

    def _run(self) -> None:
        answer = self._caller.outputs("m", "wait", gate=np.array(str(self._gate), "S"))
        self._opened.append(bool(answer["opened"]))

    def let_end(self) -> bool:
        """Open the gate; return what the model answered."""
        assert not self._opened, "the call ended by itself"
        self._gate.touch()
        self._thread.join()
        return self._opened == [True]


def test_sigterm_finishes_the_call_in_progress_then_ends_with_0(models, tmp_path):
    flags = [f"--model_base_path={models / 'many'}", "--model_name=m"]
    with running_server(tmp_path, *flags) as running:
        running.wait_for("Running gRPC ModelServer")
        caller = Caller(running.socket)
        call = LongCall(caller, tmp_path / "gate")
        running.process.send_signal(signal.SIGTERM)
        running.wait_for("Draining")
        assert call.let_end()
        assert running.wait_until_ended() == 0
        assert not running.socket.exists()
        caller.close()


def test_status_is_answered_while_every_thread_computes(models, tmp_path):
    flags = [
        f"--model_base_path={models / 'many'}",
        "--model_name=m",
        "--grpc_max_threads=1",
    ]
    with running_server(tmp_path, *flags) as running:
        running.wait_for("Running gRPC ModelServer")
        caller = Caller(running.socket)
        call = LongCall(caller, tmp_path / "gate")
        assert caller.states("m")[12][0] == AVAILABLE
        assert call.let_end()
        caller.close()


def test_a_stale_socket_is_replaced(models, tmp_path):
    flags = [f"--model_base_path={models / 'frozen'}", "--model_name=m"]
    for _ in range(2):
        with running_server(tmp_path, *flags) as running:
            running.wait_for("Running gRPC ModelServer")
            caller = Caller(running.socket)
            assert caller.states("m")[1][0] == AVAILABLE
            caller.close()  # the block ends by SIGKILL: the socket file stays


def test_a_port_in_use_ends_the_start(models, tmp_path):
    import socket

    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        flags = [f"--port={port}", f"--model_base_path={models / 'frozen'}"]
        done = subprocess.run(
            server_command(*flags),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 255
    assert (
        f"Failed to BuildAndStart gRPC server: cannot listen on 0.0.0.0:{port}"
        in done.stderr
    )


def test_tensor_content_on_demand(models, tmp_path):
    flags = [
        f"--model_base_path={models / 'many'}",
        "--model_name=m",
        "--enable_serialization_as_tensor_content=true",
    ]
    with running_server(tmp_path, *flags) as running:
        running.wait_for("Running gRPC ModelServer")
        caller = Caller(running.socket)
        response = caller.predict(predict_request("m", x=X))
        assert response.outputs["y"].tensor_content == (X * 3).tobytes()
        caller.close()


def test_tensorflow_reads_the_answers(caller):
    """The lists that are written as bytes are what TensorFlow's own reader expects."""
    responses = {
        name: caller.predict(predict_request("many", signature, **inputs))
        for name, signature, inputs in [
            ("y", "", {"x": X}),
            ("same", "text", {"t": np.array([b"a"], object)}),
        ]
    }
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    assert tf.make_ndarray(responses["y"].outputs["y"]).tolist() == (X * 3).tolist()
    assert tf.make_ndarray(responses["same"].outputs["same"]).tolist() == [b"a"]
