"""Freezes models for the converter's tests; run as a program, in a process of its own.

freeze.py DIRECTORY: NAME.pb beside NAME-KEY.npy (inputs) and NAME.KEY.npy (the graph's answers).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def main(directory: Path) -> None:
    import numpy as np
    import tensorflow as tf
    from tensorflow.python.framework import convert_to_constants

    drawn = np.random.default_rng(1)

    def freeze(name, function, *specs, **inputs):
        made = tf.function(function).get_concrete_function(*specs)
        (directory / f"{name}-unfrozen.pb").write_bytes(
            made.graph.as_graph_def().SerializeToString()
        )
        constant = convert_to_constants.convert_variables_to_constants_v2(made)
        save(name, constant.graph.as_graph_def(), inputs, constant.outputs)

    def save(name, message, inputs, outputs):
        """Write the graph, its inputs, and what it answers in a Session."""
        (directory / f"{name}.pb").write_bytes(message.SerializeToString())
        graph = tf.Graph()
        with graph.as_default():
            tf.graph_util.import_graph_def(message, name="")
        with tf.compat.v1.Session(graph=graph) as session:
            for key, value in inputs.items():
                np.save(directory / f"{name}-{key}.npy", value)
            feeds = {f"{key}:0": value for key, value in inputs.items()}
            for one in outputs:
                answer = session.run(one.name, feeds)
                np.save(directory / f"{name}.{one.name.split(':')[0]}.npy", answer)

    resnet = tf.keras.applications.ResNet50(weights=None)
    freeze(
        "resnet50",
        lambda image: resnet(image, training=False),
        tf.TensorSpec([None, 224, 224, 3], tf.float32, "image"),
        image=drawn.random((2, 224, 224, 3), np.float32),
    )

    def picture(jpeg):
        decoded = tf.io.decode_jpeg(jpeg, channels=3)
        return tf.reduce_mean(tf.cast(decoded, tf.float32), axis=[0, 1])

    jpeg = tf.io.encode_jpeg(drawn.integers(0, 255, (8, 8, 3), np.uint8)).numpy()
    (directory / "picture.jpeg").write_bytes(jpeg)
    spec = tf.TensorSpec([], tf.string, "jpeg")
    freeze("picture", picture, spec, jpeg=np.array(jpeg, object))

    def power(base, times):
        return tf.while_loop(
            lambda i, _: i < times,
            lambda i, x: (i + 1, x * base),
            (0, tf.ones_like(base)),
        )[1]

    specs = (
        tf.TensorSpec([None], tf.float32, "base"),
        tf.TensorSpec([], tf.int32, "times"),
    )
    values = {"base": np.array([2, 3], np.float32), "times": np.array(3, np.int32)}
    freeze("power", power, *specs, **values)

    spec = tf.TensorSpec([None], tf.float32, "x")
    freeze(
        "chance", lambda x: x + tf.random.uniform(tf.shape(x)), spec, x=np.ones(3, "f")
    )
    old_graph(tf, np, save)


def old_graph(tf, np, save) -> None:
    """Save a graph as TensorFlow 1 froze it: variables by name, control flow in the graph."""
    v1 = tf.compat.v1
    graph = tf.Graph()
    with graph.as_default(), v1.Session(graph=graph) as session:
        v1.disable_control_flow_v2()
        x = v1.placeholder(tf.float32, [None, 8, 8, 3], name="input")
        keep = v1.placeholder_with_default(1.0, [], name="keep_prob")
        with v1.variable_scope("net", use_resource=False):
            weights = v1.get_variable(
                "w", [3, 3, 3, 2], initializer=tf.ones_initializer()
            )
        y = tf.nn.relu(tf.nn.conv2d(x, weights, 1, "SAME"))
        y = v1.cond(tf.reduce_mean(x) > 0, lambda: y * keep, lambda: y)
        scores = tf.nn.softmax(tf.reduce_mean(y, [1, 2]), name="predict")
        tf.argmax(scores, 1, name="classes")
        session.run(v1.global_variables_initializer())
        message = v1.graph_util.convert_variables_to_constants(
            session, graph.as_graph_def(), ["predict", "classes"]
        )
    picture = np.random.default_rng(2).random((2, 8, 8, 3), np.float32)
    names = ("predict:0", "classes:0")
    save(
        "old", message, {"input": picture}, [graph.get_tensor_by_name(n) for n in names]
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
