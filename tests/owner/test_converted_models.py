"""Real models, frozen here, converted, loaded both ways, served: with TensorFlow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.graphs import FLOAT, frozen, graph, node, placeholder, two_towers
from tests.model_server.running import Caller, running_server

pytestmark = [pytest.mark.tensorflow, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


def program(*argv, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    directory: Path = tmp_path_factory.mktemp("frozen")
    done = program(HERE / "freeze.py", directory)
    assert done.returncode == 0, done.stderr
    return directory


def convert(*argv):
    return program("-m", "tdxd.cli.tdx_convert", *argv)


def converted(*argv):
    done = convert(*argv, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def answers_both_ways(version: Path, **inputs: Path):
    output = version.parent / "answers.npz"
    given = [f"{key}={path}" for key, path in inputs.items()]
    done = program(HERE / "load_both_ways.py", version, output, *given)
    assert done.returncode == 0, done.stderr
    with np.load(output) as found:
        return dict(found)


# --- ResNet50 -----------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet(models, tmp_path_factory):
    """Return the directory of the converted model and what the program reported."""
    directory = tmp_path_factory.mktemp("converted") / "resnet50"
    sample = f"image={models / 'resnet50-image.npy'}"
    return directory, converted(models / "resnet50.pb", directory, "--sample", sample)


def test_resnet50_is_found_out_and_checked(resnet):
    directory, report = resnet
    assert report["signatures"]["serving_default"] == {
        "inputs": {
            "image": {
                "tensor": "image:0",
                "dtype": "float",
                "shape": [None, 224, 224, 3],
            }
        },
        "outputs": {
            "Identity": {
                "tensor": "Identity:0",
                "dtype": "float",
                "shape": [None, 1000],
            }
        },
    }
    assert report["tensorflow"]
    assert report["runs"]["serving_default"]["difference"] <= 1e-5
    assert report["warmup_requests"] == 1
    assert report["size_bytes"] > 100e6
    assert sorted(os.listdir(directory)) == ["1"]


def test_resnet50_answers_as_its_frozen_graph_both_ways(models, resnet):
    directory, _ = resnet
    image = models / "resnet50-image.npy"
    found = answers_both_ways(directory / "1", image=image)
    want = np.load(models / "resnet50.Identity.npy")
    assert np.allclose(want.sum(axis=1), 1, atol=1e-4)
    for loader in ("eager", "session"):
        gap = np.abs(found[f"{loader}.Identity"] - want).max()
        print(f"{loader}: greatest difference to the frozen graph {gap:.2g}")
        assert gap <= 1e-6


def test_resnet50_is_served_warm(models, resnet, tmp_path):
    directory, _ = resnet
    flags = [f"--model_base_path={directory}", "--model_name=resnet50"]
    with running_server(tmp_path, *flags) as running:
        running.wait_for("Running gRPC ModelServer")
        assert "Number of warmup records read: 1." in running.log()
        caller = Caller(running.socket)
        caller.ready()
        got = caller.outputs("resnet50", image=np.load(models / "resnet50-image.npy"))
        caller.close()
    want = np.load(models / "resnet50.Identity.npy")
    assert np.abs(got["Identity"] - want).max() <= 1e-6


def test_a_damaged_warm_up_record_fails_the_load(resnet, tmp_path):
    directory, _ = resnet
    copy = tmp_path / "m" / "1"
    (copy / "assets.extra").mkdir(parents=True)
    os.link(directory / "1/saved_model.pb", copy / "saved_model.pb")
    name = "assets.extra/tf_serving_warmup_requests"
    (copy / name).write_bytes((directory / "1" / name).read_bytes()[:-1])
    flags = [f"--model_base_path={tmp_path / 'm'}", "--max_num_load_retries=0"]
    with running_server(tmp_path, *flags) as running:
        assert running.wait_until_ended() == 255
        assert f"{name}: " in running.log()
    flags.append("--enable_model_warmup=false")
    with running_server(tmp_path, *flags) as running:
        running.wait_for("Running gRPC ModelServer")


def test_tensorflow_reads_the_warm_up_record(models, resnet, tmp_path):
    directory, _ = resnet
    path = directory / "1/assets.extra/tf_serving_warmup_requests"
    code = (
        "import sys, numpy, tensorflow as tf\n"
        "from tensorflow_serving.apis import prediction_log_pb2 as p\n"
        "(record,) = tf.data.TFRecordDataset(sys.argv[1])\n"
        "request = p.PredictionLog.FromString(record.numpy()).predict_log.request\n"
        "assert request.model_spec.name == 'resnet50', request.model_spec\n"
        "got = tf.make_ndarray(request.inputs['image'])\n"
        "assert numpy.array_equal(got, numpy.load(sys.argv[2]))\n"
    )
    done = program("-c", code, path, models / "resnet50-image.npy")
    assert done.returncode == 0, done.stderr


# --- other models -------------------------------------------------------------


def test_a_graph_of_tensorflow_1_by_the_references_command_line(models, tmp_path):
    report = converted(
        *("--import_path", models / "old.pb", "--export_dir", tmp_path / "m"),
        *("--inputs", "input", "--outputs", "predict", "--model_version", "3"),
    )
    assert list(report["signatures"]["serving_default"]["inputs"]) == ["input"]
    found = answers_both_ways(tmp_path / "m/3", input=models / "old-input.npy")
    want = np.load(models / "old.predict.npy")
    assert np.allclose(found["eager.predict"], want, atol=1e-6)
    assert np.allclose(found["session.predict"], want, atol=1e-6)


def test_every_output_of_a_graph_and_an_optional_input(models, tmp_path):
    report = converted(models / "old.pb", tmp_path / "m")
    signature = report["signatures"]["serving_default"]
    assert list(signature["inputs"]) == ["input"]
    # predict goes into classes, so the graph does not show it as a result of its own.
    assert signature["outputs"]["classes"]["dtype"] == "int64"
    report = converted(
        *(models / "old.pb", tmp_path / "m", "--model-version", "2"),
        *("--input", "input", "--input", "keep_prob"),
        *("--output", "predict", "--output", "classes"),
    )
    assert report["signatures"]["serving_default"]["inputs"]["keep_prob"]["shape"] == []


def test_functions_and_loops(models, tmp_path):
    report = converted(
        *(models / "power.pb", tmp_path / "m"),
        *("--sample", f"base={models / 'power-base.npy'}"),
        *("--sample", f"times={models / 'power-times.npy'}"),
    )
    assert report["runs"]["serving_default"]["difference"] == 0
    inputs = {key: models / f"power-{key}.npy" for key in ("base", "times")}
    found = answers_both_ways(tmp_path / "m/1", **inputs)
    assert found["eager.Identity"].tolist() == [8, 27]


def test_an_input_that_cannot_be_made_up_is_loaded_only(models, tmp_path):
    report = converted(models / "picture.pb", tmp_path / "m")
    assert report["runs"]["serving_default"] == {
        "difference": None,
        "reason": "no input can be made up for jpeg",
    }
    assert report["warmup_requests"] == 0
    sample = f"jpeg={models / 'picture.jpeg'}"
    argv = (models / "picture.pb", tmp_path / "m", "--model-version", "2")
    report = converted(*argv, "--sample", sample)
    assert report["runs"]["serving_default"]["difference"] == 0
    assert report["warmup_requests"] == 1


def test_a_made_up_input_that_the_model_refuses_is_said_not_recorded(tmp_path):
    message = two_towers()
    for one in message.node[:3]:  # made up as [1,1], which has no best two
        one.attr["shape"].shape.dim[1].size = -1
    done = convert(
        frozen(message, tmp_path / "g.pb"), tmp_path / "m", "--output", "topk"
    )
    assert done.returncode == 0, done.stderr
    assert "not run, give an input with --sample: " in done.stdout
    assert "warm-up requests: 0" in done.stdout
    assert not (tmp_path / "m/1/assets.extra").exists()


def test_a_sample_that_the_model_refuses_is_not_made_its_warm_up(models, tmp_path):
    bad = tmp_path / "bad.jpeg"
    bad.write_bytes(b"no picture")
    done = convert(models / "picture.pb", tmp_path / "m", "--sample", f"jpeg={bad}")
    assert done.returncode == 65
    assert "signature serving_default refuses its sample: " in done.stderr
    assert not (tmp_path / "m").exists()


def test_a_graph_that_answers_by_chance_is_refused(models, tmp_path):
    done = convert(models / "chance.pb", tmp_path / "m")
    assert done.returncode == 65
    assert (
        "the eager and the Session loader answer differently: Identity" in done.stderr
    )
    assert "--no-check" in done.stderr
    assert not (tmp_path / "m").exists()


def test_a_graph_that_was_not_frozen_is_refused(models, tmp_path):
    done = convert(models / "resnet50-unfrozen.pb", tmp_path / "m")
    assert done.returncode == 65
    assert "freeze it first" in done.stderr
    assert not (tmp_path / "m").exists()


def test_an_operation_that_tensorflow_does_not_have(tmp_path):
    own = graph(placeholder("x"), node("y", "SomebodysOwn", "x"))
    done = convert(frozen(own, tmp_path / "g.pb"), tmp_path / "m")
    assert done.returncode == 65
    assert "TensorFlow cannot load the model: NotFoundError: " in done.stderr
    assert "SomebodysOwn" in done.stderr
    assert not (tmp_path / "m").exists()


def test_a_graph_whose_types_do_not_fit(tmp_path):
    wrong = graph(placeholder("x"), node("y", "Relu", "x", types={"T": 7}))
    done = convert(frozen(wrong, tmp_path / "g.pb"), tmp_path / "m")
    assert done.returncode == 65
    assert "TensorFlow cannot load the model: " in done.stderr
    assert not (tmp_path / "m").exists()


def test_a_stated_shape_is_what_servers_check(tmp_path):
    message = graph(
        placeholder("x", None, FLOAT), node("y", "Relu", "x", types={"T": FLOAT})
    )
    path = frozen(message, tmp_path / "g.pb")
    report = converted(path, tmp_path / "m", "--input", "x[?,4]")
    assert report["runs"]["serving_default"]["difference"] == 0
    made = report["signatures"]["serving_default"]["inputs"]["x"]
    assert made["shape"] == [None, 4]


def test_several_signatures_one_cut_in_the_middle(tmp_path):
    path = frozen(two_towers(), tmp_path / "g.pb")
    report = converted(
        *(path, tmp_path / "m", "--output", "am", "--signature", "cut"),
        *("--input", "x=deep/out", "--output", "topk", "--output", "topk:1"),
    )
    assert set(report["runs"]) == {"serving_default", "cut"}
    assert all(one["difference"] == 0 for one in report["runs"].values())
    assert report["signatures"]["cut"]["inputs"]["x"]["shape"] == [None, 4]
    assert report["warmup_requests"] == 2


def test_the_table_of_operations_is_that_of_the_installed_tensorflow():
    done = program("-m", "contrib.gen_op_outputs", "--check")
    assert done.returncode == 0, done.stderr
