"""Train a small classifier on scikit-learn's handwritten digits and export it.

    train_digits.py DIRECTORY

writes into DIRECTORY

    models/digits/1/    the SavedModel: input `image` float [-1, 8, 8] (pixels 0 to 16, as
                        scikit-learn has them), output `probabilities` float [-1, 10]
    heldout.npz         images, labels, and this process's own answers: `answers_all` computed in
                        one batch, `answers_one` one by one (the last bit depends on the batch)
    images.npy          the held-out images, for tdx-infer --input
    digit.npy           the first of them, as a batch of one

and prints one line with the accuracy. The same machine gives the same model in every run.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

tf.get_logger().setLevel(
    "ERROR"
)  # the Session loader is deprecated, and what Serving uses

SEED = 20
HELD_OUT = 360
EPOCHS = 15


def main() -> int:
    """Run the program."""
    if len(sys.argv) != 2:
        print(f"usage: {sys.argv[0]} DIRECTORY", file=sys.stderr)
        return 64
    directory = Path(sys.argv[1])
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.float32)
    order = np.random.default_rng(SEED).permutation(len(images))
    train, held = order[HELD_OUT:], order[:HELD_OUT]
    model = fit(images[train], labels[train])
    answer = tf.function(
        lambda image: model(image, training=False),
        input_signature=[tf.TensorSpec([None, 8, 8], tf.float32, name="image")],
    )
    answers = answer(images[held]).numpy()
    one_by_one = np.concatenate([answer(images[i : i + 1]).numpy() for i in held])
    export = directory / "models" / "digits" / "1"
    export_model(model, export)
    check_both_loaders(export, images[held], answers)
    np.savez(
        directory / "heldout.npz",
        images=images[held],
        labels=labels[held],
        answers_all=answers,
        answers_one=one_by_one,
    )
    np.save(directory / "images.npy", images[held])
    np.save(directory / "digit.npy", images[held][:1])
    accuracy = float((answers.argmax(axis=1) == labels[held]).mean())
    print(
        f"digits: trained on {len(train)}, held out {len(held)}, "
        f"accuracy {accuracy:.3f}, exported to {export}"
    )
    return 0


def fit(images: Any, labels: Any) -> Any:
    """Train the classifier."""
    keras.utils.set_random_seed(SEED)
    tf.config.experimental.enable_op_determinism()
    model = keras.Sequential(
        [
            keras.layers.Input((8, 8), name="image"),
            keras.layers.Rescaling(1 / 16),
            keras.layers.Reshape((8, 8, 1)),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
    model.fit(images, labels, epochs=EPOCHS, batch_size=32, verbose=0)
    return model


def export_model(model: Any, path: Path) -> None:
    """Write the SavedModel beside its place and move it there: a poll sees all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".new-{path.name}")
    shutil.rmtree(fresh, ignore_errors=True)
    # An ExportArchive, because a tf.Module around a Keras model does not load in a Session,
    # which is what TensorFlow Serving uses.
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint(
        name="serving_default",
        fn=lambda image: {"probabilities": model(image, training=False)},
        input_signature=[tf.TensorSpec([None, 8, 8], tf.float32, name="image")],
    )
    archive.write_out(fresh, verbose=False)
    shutil.rmtree(path, ignore_errors=True)
    fresh.rename(path)


def check_both_loaders(path: Path, images: Any, answers: Any) -> None:
    """Load as the drop-in does and as TensorFlow Serving does; both must answer the same."""
    signature = tf.saved_model.load(str(path)).signatures["serving_default"]
    eager = signature(image=tf.constant(images))["probabilities"].numpy()
    v1 = tf.compat.v1
    with v1.Session(graph=tf.Graph()) as session:
        graph = v1.saved_model.load(session, ["serve"], str(path))
        names = graph.signature_def["serving_default"]
        output = names.outputs["probabilities"].name
        in_session = session.run(output, {names.inputs["image"].name: images})
    if not (np.array_equal(eager, answers) and np.array_equal(in_session, answers)):
        sys.exit(f"error: the model in {path} answers otherwise than the one trained")


if __name__ == "__main__":
    sys.exit(main())
