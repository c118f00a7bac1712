"""Loads a SavedModel eagerly and in a Session and runs it; run as a program.

load_both_ways.py VERSION_DIRECTORY OUTPUT.npz KEY=FILE.npy...
"""

from __future__ import annotations

import sys

import numpy as np
import tensorflow as tf


def main(path: str, output: str, *inputs: str) -> None:
    pairs = (text.split("=", 1) for text in inputs)
    arrays = {key: np.load(name, allow_pickle=True) for key, name in pairs}
    function = tf.saved_model.load(path).signatures["serving_default"]
    eager = function(**{key: tf.constant(value) for key, value in arrays.items()})
    v1 = tf.compat.v1
    with v1.Session(graph=tf.Graph()) as session:
        meta = v1.saved_model.load(session, ["serve"], path)
        signature = meta.signature_def["serving_default"]
        feeds = {signature.inputs[key].name: value for key, value in arrays.items()}
        fetches = {key: one.name for key, one in signature.outputs.items()}
        static = session.run(fetches, feeds)
    answers = {f"eager.{key}": value.numpy() for key, value in eager.items()}
    np.savez(output, **answers, **{f"session.{k}": v for k, v in static.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
