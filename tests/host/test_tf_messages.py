"""TensorFlow Serving's messages without TensorFlow; each test in an interpreter of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAMILIES = [
    "model_status",
    "predict",
    "model_metadata",
    "model_server_config",
    "meta_graph",
    "saved_model",
    "tensor",
    "prediction_log",
]


def run(code, *options):
    return subprocess.run(
        [sys.executable, "-W", "error", *options, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def passes(code):
    done = run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_loads_alone_and_leaves_no_tensorflow_behind(family):
    passes(f"""
import sys
from tdxd.host import tf_messages
module = tf_messages.{family}()
assert tf_messages.{family}() is module
left = [n for n in sys.modules if n == "tensorflow" or n.startswith("tensorflow.")]
assert not left, left
""")


def test_status_request_encodes_as_the_protocol_says():
    passes("""
from tdxd.host import tf_messages
request = tf_messages.model_status().GetModelStatusRequest()
request.model_spec.name = "m"
assert request.SerializeToString() == bytes([10, 3, 10, 1, ord("m")])
""")


def test_families_share_their_message_classes():
    passes("""
from tdxd.host import tf_messages
predict, status = tf_messages.predict(), tf_messages.model_status()
spec = predict.PredictRequest().model_spec
assert type(spec) is type(status.GetModelStatusRequest().model_spec)
metadata = tf_messages.model_metadata().SignatureDefMap()
one = tf_messages.meta_graph().SignatureDef()
metadata.signature_def["x"].CopyFrom(one)
""")


def test_loading_costs_a_small_part_of_tensorflow():
    done = run("""
import resource, time
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from tdxd.host import tf_messages
tf_messages.model_status()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) // 1024)
""")
    assert int(done.stdout) < 64  # MiB; TensorFlow itself takes more than 400


def test_without_tensorflow_the_error_says_what_to_install():
    done = run(
        """
import sys
sys.path[:] = [p for p in sys.path if "site-packages" not in p]
sys.path.insert(0, ".")
from tdxd.errors import ServeError
from tdxd.host import tf_messages
try:
    tf_messages.model_status()
except ServeError as exc:
    print(exc.message, "|", exc.hint)
assert "tensorflow" not in sys.modules
""",
        "-S",
    )
    assert done.stdout == (
        "the tensorflow package is not installed | install tensorflow-serving-api, "
        "whose wheel brings tensorflow along\n"
    ), done.stderr


@pytest.mark.tensorflow
@pytest.mark.slow
@pytest.mark.parametrize("first", ["messages", "tensorflow"])
def test_the_real_tensorflow_works_before_and_after(first):
    lines = {
        "messages": "from tdxd.host import tf_messages as m; m.predict(); m.saved_model()",
        "tensorflow": "import tensorflow as tf",
    }
    order = sorted(lines.values(), key=lambda line: line != lines[first])
    done = run(
        "\n".join(
            [
                *order,
                "request = m.predict().PredictRequest()",
                "request.inputs['x'].CopyFrom(tf.make_tensor_proto([1.0, 2.0]))",
                "from tensorflow_serving.apis import predict_pb2",
                "assert predict_pb2.PredictRequest is type(request)",
                "assert tf.constant(3).numpy() == 3",
                "import tensorflow.core.framework.tensor_pb2 as t",
                "assert type(request.inputs['x']) is t.TensorProto",
            ]
        )
    )
    assert done.returncode == 0, done.stderr
