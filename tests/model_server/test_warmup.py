"""The warm-up of a loaded model, without TensorFlow: what is executed, what fails the load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from tdxd.core.tensors import write_content
from tdxd.core.tfrecord import write_records
from tdxd.host import tf_messages
from tdxd.model_server.failure import RpcFailure
from tdxd.model_server.registry import Servable
from tdxd.model_server.warmup import warm_up


def signature():
    made = tf_messages.meta_graph().SignatureDef(
        method_name="tensorflow/serving/predict"
    )
    made.inputs["x"].dtype = 1
    made.inputs["x"].tensor_shape.dim.add().size = -1
    made.outputs["y"].dtype = 1
    return made


class Warmed:
    """A version's directory with a warm-up file, and what was executed of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.seen: list[list[float]] = []
        self.log: list[str] = []

    def write(self, data: bytes) -> None:
        path = self.directory / "assets.extra" / "tf_serving_warmup_requests"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)

    def run(self, rounds: int = 1) -> None:
        def execute(inputs):
            self.seen.append(inputs["x"].tolist())
            return {"y": inputs["x"]}

        servable = Servable(
            signatures={"serving_default": signature()},
            runners={"serving_default": execute},
        )
        warm_up(servable, str(self.directory), rounds=rounds, log=self.log.append)

    def refusal(self) -> tuple[str, str]:
        with pytest.raises(RpcFailure) as caught:
            self.run()
        return caught.value.code.name, caught.value.text


@pytest.fixture
def warmed(tmp_path):
    return Warmed(tmp_path)


def record(*values: float, name: str = "") -> bytes:
    log: Any = tf_messages.prediction_log().PredictionLog()
    request = log.predict_log.request
    request.model_spec.signature_name = name
    write_content(request.inputs["x"], np.array(values, np.float32))
    return bytes(log.SerializeToString())


def test_each_request_is_executed_in_order_as_often_as_asked(warmed):
    warmed.write(write_records([record(1), record(2, 3)]))
    warmed.run(rounds=2)
    assert warmed.seen == [[1], [1], [2, 3], [2, 3]]
    assert "Number of warmup records read: 2." in warmed.log[-1]


def test_without_a_file_or_without_rounds_nothing_happens(warmed):
    warmed.run()
    warmed.write(b"damaged")
    warmed.run(rounds=0)
    assert (warmed.seen, warmed.log) == ([], [])


def test_a_damaged_file_fails_the_load(warmed):
    warmed.write(write_records([record(1)])[:-1])
    code, text = warmed.refusal()
    assert code == "DATA_LOSS"
    assert "cut in the record at byte 0" in text
    warmed.write(write_records([b"\xff\xff"]))
    assert warmed.refusal()[0] == "DATA_LOSS"
    assert warmed.seen == []


def test_a_request_that_fails_fails_the_load(warmed):
    warmed.write(write_records([record(1), record(1, name="other")]))
    assert warmed.refusal() == (
        grpc.StatusCode.FAILED_PRECONDITION.name,
        'Serving signature key "other" not found.',
    )


def test_too_many_requests_fail_the_load(warmed):
    warmed.write(write_records([record(1)] * 1001))
    code, text = warmed.refusal()
    assert code == "INVALID_ARGUMENT"
    assert text.startswith("Number of warmup records exceeds the maximum (1000) at ")


def test_classify_and_regress_requests_are_executed_too(warmed):
    records = []
    for kind in ("classify_log", "regress_log"):
        log: Any = tf_messages.prediction_log().PredictionLog()
        getattr(log, kind).request.model_spec.signature_name = "other"
        warmed.write(write_records([log.SerializeToString()]))
        records.append(warmed.refusal())
    refused = ("INVALID_ARGUMENT", "No signature was found with the name: other")
    assert records == [refused, refused]


def test_a_call_that_this_server_does_not_have_is_left_out(warmed):
    log: Any = tf_messages.prediction_log().PredictionLog()
    log.session_run_log.SetInParent()
    warmed.write(write_records([log.SerializeToString(), record(1)]))
    warmed.run()
    assert warmed.seen == [[1]]
    assert warmed.log[0] == "Unsupported log_type for warmup: session_run_log; left out"
