"""Makes the SavedModels of the conformance tests; run as a program, in a process of its own.

models.py DIRECTORY
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def main(directory: Path) -> None:
    import tensorflow as tf

    class Many(tf.Module):  # type: ignore[misc]
        """Signatures of several kinds; `factor` tells the versions apart."""

        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = tf.Variable(factor)

        @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32, "x")])
        def scale(self, x):
            return {"y": x * self.factor, "total": tf.reduce_sum(x)}

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "t")])
        def text(self, t):
            return {"length": tf.strings.length(t), "same": t}

        @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 3], tf.float32, "i")])
        def picture(self, i):
            return {"o": tf.nn.conv2d(i, tf.ones([3, 3, 3, 2]), 1, "SAME")}

        @tf.function(
            input_signature=[
                tf.TensorSpec(None, tf.float32, "a"),
                tf.TensorSpec(None, tf.float32, "b"),
            ]
        )
        def multiply(self, a, b):
            return {"o": tf.matmul(a, b)}

        @tf.function(
            input_signature=[
                tf.TensorSpec([None], kind, kind.name)
                for kind in (tf.int64, tf.bool, tf.float16, tf.complex64, tf.uint8)
            ]
        )
        def kinds(self, *tensors):
            return {f"same_{one.dtype.name}": tf.identity(one) for one in tensors}

        @tf.function(input_signature=[tf.TensorSpec([], tf.string, "gate")])
        def wait(self, gate):
            """Write a file `gate`.started, then last until a file `gate` exists."""
            write = tf.io.write_file(gate + ".started", "")

            def shut(_):
                return tf.equal(tf.size(tf.io.matching_files(gate)), 0)

            with tf.control_dependencies([write]):
                turns = tf.while_loop(shut, lambda i: [i + 1], [tf.constant(0)])[0]
            return {"opened": turns >= 0}

    def save(path: Path, factor: float) -> None:
        made = Many(factor)
        signatures = {
            "serving_default": made.scale,
            "text": made.text,
            "picture": made.picture,
            "multiply": made.multiply,
            "kinds": made.kinds,
            "wait": made.wait,
        }
        tf.saved_model.save(made, str(path), signatures=signatures)

    save(directory / "many" / "1", 2.0)
    save(directory / "many" / "12", 3.0)
    frozen(tf, directory / "frozen" / "1")
    examples(tf, directory / "examples" / "1")
    open_rank(tf, directory / "open" / "1")
    bad = directory / "bad" / "1"
    bad.mkdir(parents=True)
    (bad / "saved_model.pb").write_bytes(b"\xff\xff\xff")
    (directory / "nopb" / "1").mkdir(parents=True)
    untagged = directory / "untagged" / "1"
    shutil.copytree(directory / "frozen" / "1", untagged)
    retag(untagged / "saved_model.pb")
    cut = directory / "cut" / "1"
    shutil.copytree(directory / "many" / "1", cut)
    next((cut / "variables").glob("*.index")).unlink()
    (directory / "empty" / "notes").mkdir(parents=True)


def frozen(tf, path: Path) -> None:
    """Write a TensorFlow 1 model: a graph of constants, an odd name, as the converter makes."""
    v1 = tf.compat.v1
    with v1.Session(graph=tf.Graph()) as session:
        x = v1.placeholder(tf.float32, [None, 2], name="input")
        y = tf.add(x, 1.0, name="predict")
        v1.saved_model.simple_save(session, str(path), {"input": x}, {"predict": y})


def examples(tf, path: Path) -> None:
    """Write a model of tf.Example messages, of which it reads two numbers, `x`."""
    v1 = tf.compat.v1
    signatures = v1.saved_model.signature_def_utils
    with v1.Session(graph=tf.Graph()) as session:
        encoded = v1.placeholder(tf.string, [None], name="encoded")
        features = {"x": tf.io.FixedLenFeature([2], tf.float32)}
        x = v1.parse_example(encoded, features)["x"]
        labels = tf.tile([["left", "right"]], [tf.shape(x)[0], 1])
        total = tf.reduce_sum(x, 1)
        builder = v1.saved_model.Builder(str(path))
        builder.add_meta_graph_and_variables(
            session,
            ["serve"],
            {
                "serving_default": signatures.classification_signature_def(
                    encoded, labels, x
                ),
                "scores": signatures.classification_signature_def(encoded, None, x),
                "total": signatures.regression_signature_def(encoded, total),
                "wide": signatures.build_signature_def(
                    {"inputs": v1.saved_model.utils.build_tensor_info(encoded)},
                    {"outputs": v1.saved_model.utils.build_tensor_info(x)},
                    "tensorflow/serving/regress",
                ),
            },
        )
        builder.save()


def open_rank(tf, path: Path) -> None:
    """Write a model whose convolution takes whatever a request sends: wrong ranks abort it."""

    class Open(tf.Module):  # type: ignore[misc]
        @tf.function(input_signature=[tf.TensorSpec(None, tf.float32, "i")])
        def convolve(self, i):
            return {"o": tf.nn.conv2d(i, tf.ones([3, 3, 3, 2]), 1, "SAME")}

    made = Open()
    tf.saved_model.save(made, str(path), signatures={"serving_default": made.convolve})


def retag(path: Path) -> None:
    from tensorflow.core.protobuf import saved_model_pb2

    message = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    message.meta_graphs[0].meta_info_def.tags[:] = ["train"]
    path.write_bytes(message.SerializeToString())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
