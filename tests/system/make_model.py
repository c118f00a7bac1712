"""Makes a small SavedModel: y = 2x + 1. Run in a process of its own: it imports TensorFlow."""

from __future__ import annotations

import sys

import tensorflow as tf


class Line(tf.Module):  # type: ignore[misc]  # TensorFlow has no types
    @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32, name="x")])
    def predict(self, x):
        return {"y": 2.0 * x + 1.0}


if __name__ == "__main__":
    model = Line()
    tf.saved_model.save(
        model, sys.argv[1], signatures={"serving_default": model.predict}
    )
