"""Makes small SavedModels: y = 2x + 1, and another of y = 3x + 1 to take its place.

Run in a process of its own: it imports TensorFlow. Arguments: a directory for each.
"""

from __future__ import annotations

import sys

import tensorflow as tf
from tensorflow.python.data.experimental.ops.testing import sleep

X = tf.TensorSpec([None, 4], tf.float32, name="x")


class Line(tf.Module):  # type: ignore[misc]  # TensorFlow has no types
    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    @tf.function(input_signature=[X])
    def predict(self, x):
        return {"y": self.slope * x + 1.0}

    @tf.function(input_signature=[X, tf.TensorSpec([], tf.int64, name="wait_ms")])
    def late(self, x, wait_ms):
        """Answer after a while, which costs nobody a processor."""
        waits = iter(tf.data.Dataset.range(1).apply(sleep(wait_ms * 1000)))
        return {"y": self.slope * x + 1.0, "waited_ms": next(waits) + wait_ms}


if __name__ == "__main__":
    for slope, directory in zip((2.0, 3.0), sys.argv[1:], strict=False):
        line = Line(slope)
        tf.saved_model.save(
            line,
            directory,
            signatures={"serving_default": line.predict, "late": line.late},
        )
