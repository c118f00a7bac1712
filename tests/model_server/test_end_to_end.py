"""tdx-infer, TLS and tdx-model-server together, with the demo's digits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.certificates import self_signed
from tests.model_server.running import ROOT, running_server
from tests.model_server.tls_front import tls_front

pytestmark = [pytest.mark.tensorflow, pytest.mark.slow]

DEMO = ROOT / "contrib" / "demo"


def run(*arguments):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    directory: Path = tmp_path_factory.mktemp("digits")
    run(DEMO / "train_digits.py", directory)
    return directory


@pytest.fixture(scope="module")
def infer(digits, tmp_path_factory):
    """Return a function that runs `tdx-infer VERB` against the served digits."""
    directory = tmp_path_factory.mktemp("served")
    pem, ca = directory / "server.pem", directory / "ca.pem"
    private, public = self_signed("localhost")
    pem.write_bytes(private)
    ca.write_bytes(public)
    flags = [f"--model_base_path={digits}/models/digits", "--model_name=digits"]
    with running_server(directory, *flags) as running:
        running.wait_for("Running gRPC ModelServer")
        with tls_front(pem, running.socket) as address:

            def call(verb, *arguments):
                common = [address, "--ca", ca, "--model", "digits"]
                return run("-m", "tdxd.cli.tdx_infer", verb, *common, *arguments)

            yield call


def test_answers_equal_the_local_models_bit_for_bit(digits, infer, tmp_path):
    answers = tmp_path / "answers.npy"
    infer("predict", "--input", digits / "images.npy", "--output", answers)
    text = run(DEMO / "check_answers.py", digits / "heldout.npz", answers)
    assert "equal to the local model 360/360, greatest difference 0" in text
    with np.load(digits / "heldout.npz") as heldout:
        labels = heldout["labels"]
    accuracy = (np.load(answers).argmax(axis=1) == labels).mean()
    assert accuracy > 0.95


def test_a_batch_of_one_equals_the_local_models_batch_of_one(digits, infer, tmp_path):
    answers = tmp_path / "answers.npy"
    infer("predict", "--input", f"image={digits / 'digit.npy'}", "--output", answers)
    with np.load(digits / "heldout.npz") as heldout:
        assert np.array_equal(np.load(answers), heldout["answers_one"][:1])


def test_json_in_and_out(digits, infer, tmp_path):
    image = tmp_path / "image.json"
    image.write_text(json.dumps(np.load(digits / "digit.npy").tolist()))
    answer = json.loads(infer("predict", "--input", image, "--json"))
    assert answer["version"] == 1
    output = answer["outputs"]["probabilities"]
    assert output["shape"] == [1, 10]
    assert sum(output["values"][0]) == pytest.approx(1.0, abs=1e-5)


def test_an_image_file_and_labels(digits, infer, tmp_path):
    pixels = np.load(digits / "digit.npy")[0].astype(np.uint8)
    image, labels = tmp_path / "digit.png", tmp_path / "labels.txt"
    Image.fromarray(pixels).save(image)
    labels.write_text("".join(f"digit {number}\n" for number in range(10)))
    arguments = ["--input", image, "--labels", labels, "--top", 1, "--json"]
    (top,) = json.loads(infer("predict", *arguments))["outputs"]["probabilities"]["top"]
    with np.load(digits / "heldout.npz") as heldout:
        want = int(heldout["answers_one"][0].argmax())
    assert (top[0]["index"], top[0]["label"]) == (want, f"digit {want}")
    assert "input   image: float [?, 8, 8]\n" in infer("show")


def test_bench(digits, infer):
    load = ["--cnum", 2, "--loop", 5, "--batch", 8, "--json"]
    figures = json.loads(infer("bench", "--input", digits / "images.npy", *load))
    assert figures["requests"] == 10
    assert figures["errors"] == {}
