"""Conversion without TensorFlow: what is in the SavedModel, and that it appears whole or not."""

from __future__ import annotations

import os
import random
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

from tdxd.core.signature import SignatureRequest
from tdxd.core.tensors import read_tensor
from tdxd.core.tfrecord import read_records
from tdxd.errors import DataError, HostError, UnavailableError
from tdxd.host import tf_messages
from tdxd.owner.convert.convert import ConvertRequest, Run, convert, describe, judge
from tdxd.owner.convert.tensorflow_check import find_tensorflow
from tdxd.owner.convert.tensorflow_child import Checker
from tests.graphs import (
    FLOAT,
    INT32,
    STRING,
    frozen,
    graph,
    node,
    placeholder,
    two_towers,
)

SERVE = "tensorflow/serving/predict"


@pytest.fixture
def towers(tmp_path) -> Path:
    path: Path = frozen(two_towers(), tmp_path / "towers.pb")
    return path


@pytest.fixture
def only_the_graph(tmp_path, towers):
    """Look, after the test, whether it left anything but the graph."""
    yield
    assert sorted(one.name for one in tmp_path.iterdir()) == ["towers.pb"]


def request(graph, directory, **more) -> ConvertRequest:
    return ConvertRequest(graph=graph, directory=directory, **more)


def loaded(path):
    return tf_messages.saved_model().SavedModel.FromString(path.read_bytes())


def warmup_requests(version: Path):
    path = version / "assets.extra" / "tf_serving_warmup_requests"
    log = tf_messages.prediction_log().PredictionLog
    return [
        log.FromString(one).predict_log.request
        for one in read_records(path.read_bytes(), source=str(path))
    ]


# --- what is made -------------------------------------------------------------


def test_a_saved_model_is_the_graph_with_a_signature(tmp_path, towers):
    made = convert(request(towers, tmp_path / "models" / "towers"), None)
    version = tmp_path / "models" / "towers" / "1"
    assert made.path == version
    assert [one.name for one in version.iterdir()] == ["saved_model.pb"]
    model = loaded(version / "saved_model.pb")
    assert model.saved_model_schema_version == 1
    (meta,) = model.meta_graphs
    assert list(meta.meta_info_def.tags) == ["serve"]
    want = two_towers()
    del want.node[2]  # the placeholder for nothing
    for one in want.node:
        one.device = ""
    assert meta.graph_def == want
    (signature,) = meta.signature_def.values()
    assert signature.method_name == SERVE
    assert {key: one.name for key, one in signature.inputs.items()} == {
        "left": "left:0",
        "right": "tower/right:0",
    }
    assert [one.size for one in signature.inputs["left"].tensor_shape.dim] == [-1, 4]
    assert {key: one.dtype for key, one in signature.outputs.items()} == {
        "am": 9,
        "topk": FLOAT,
        "topk_1": INT32,
    }
    assert signature.outputs["am"].tensor_shape.unknown_rank


def test_the_same_graph_makes_the_same_bytes(tmp_path, towers):
    one = convert(request(towers, tmp_path / "a"), None)
    two = convert(request(towers, tmp_path / "b", version=7), None)
    assert one.sha256 == two.sha256
    data = (tmp_path / "b" / "7" / "saved_model.pb").read_bytes()
    assert len(data) == one.size_bytes


def test_everybody_may_read_it(tmp_path, towers):
    old = os.umask(0o077)
    try:
        convert(request(towers, tmp_path / "m"), None)
    finally:
        os.umask(old)
    version = tmp_path / "m" / "1"
    assert stat.S_IMODE(version.stat().st_mode) == 0o755
    assert stat.S_IMODE((version / "saved_model.pb").stat().st_mode) == 0o644


def test_several_signatures(tmp_path, towers):
    wanted = (
        SignatureRequest().with_output("best=topk:1"),
        SignatureRequest(name="softmax").with_input("x=deep/out").with_output("am"),
    )
    convert(request(towers, tmp_path / "m", signatures=wanted), None)
    (meta,) = loaded(tmp_path / "m" / "1" / "saved_model.pb").meta_graphs
    assert set(meta.signature_def) == {"serving_default", "softmax"}
    assert meta.signature_def["softmax"].inputs["x"].name == "deep/out:0"


def test_a_graph_as_text(tmp_path):
    path = tmp_path / "g.pbtxt"
    path.write_text(str(two_towers()))
    assert describe(path, [SignatureRequest()])[0].inputs[0].key == "left"


def test_a_second_version_goes_beside_the_first(tmp_path, towers):
    for version in (1, 2):
        convert(request(towers, tmp_path / "m", version=version), None)
    assert sorted(one.name for one in (tmp_path / "m").iterdir()) == ["1", "2"]


def test_an_output_whose_type_only_tensorflow_knows(tmp_path):
    own = graph(placeholder("x"), node("y", "SomebodysOwn", "x"))
    path = frozen(own, tmp_path / "g.pb")
    with pytest.raises(DataError, match="type of y:0 is not known without TensorFlow"):
        convert(request(path, tmp_path / "m"), None)
    assert not (tmp_path / "m").exists()


# --- samples and the warm-up record -------------------------------------------


def test_given_samples_are_the_warm_up_request(tmp_path, towers):
    left, right = (np.random.default_rng(i).random((2, 4), np.float32) for i in (1, 2))
    np.save(tmp_path / "l.npy", left)
    np.save(tmp_path / "r.npy", right)
    samples = {"left": tmp_path / "l.npy", "right": tmp_path / "r.npy"}
    made = convert(request(towers, tmp_path / "m", samples=samples), None)
    assert made.warmup_requests == 1
    (sent,) = warmup_requests(tmp_path / "m" / "1")
    assert (sent.model_spec.name, sent.model_spec.signature_name) == (
        "m",
        "serving_default",
    )
    assert np.array_equal(read_tensor(sent.inputs["left"]), left)
    assert np.array_equal(read_tensor(sent.inputs["right"]), right)


def test_one_given_sample_and_the_rest_made_up(tmp_path, towers):
    np.save(tmp_path / "l.npy", np.ones((3, 4), np.float32))
    samples = {"left": tmp_path / "l.npy"}
    convert(request(towers, tmp_path / "m", samples=samples), None)
    (sent,) = warmup_requests(tmp_path / "m" / "1")
    made_up = read_tensor(sent.inputs["right"])
    drawn = random.Random(0)
    assert made_up.shape == (1, 4)
    assert made_up[0, 0] == np.float32(drawn.random())


def test_the_bytes_of_a_string(tmp_path):
    message = graph(
        placeholder("jpeg", (-1,), STRING), node("y", "StringLength", "jpeg")
    )
    path = frozen(message, tmp_path / "g.pb")
    (tmp_path / "a.jpeg").write_bytes(b"\xff\xd8\xff\0")
    samples = {"jpeg": tmp_path / "a.jpeg"}
    convert(request(path, tmp_path / "m", samples=samples), None)
    (sent,) = warmup_requests(tmp_path / "m" / "1")
    assert read_tensor(sent.inputs["jpeg"]).tolist() == [b"\xff\xd8\xff\0"]


def test_no_warm_up_if_not_wanted_or_if_nothing_has_proved_to_run(tmp_path, towers):
    np.save(tmp_path / "l.npy", np.ones((3, 4), np.float32))
    samples = {"left": tmp_path / "l.npy"}
    unwanted = request(towers, tmp_path / "m", samples=samples, warmup=False)
    assert convert(unwanted, None).warmup_requests == 0
    unproved = request(towers, tmp_path / "m", version=2)
    assert convert(unproved, None).warmup_requests == 0
    for version in ("1", "2"):
        assert not (tmp_path / "m" / version / "assets.extra").exists()


@pytest.mark.parametrize(
    ("key", "array", "text"),
    [
        ("x", np.zeros(4, np.float32), "sample x: no input has this key"),
        ("left", np.zeros((1, 4)), "elements of double, the input has float"),
        ("left", np.zeros(4, np.float32), "shape [4], the input has [?,4]"),
        ("left", np.zeros((4, 3), np.float32), "shape [4,3], the input has [?,4]"),
    ],
)
def test_a_sample_that_does_not_fit(tmp_path, towers, key, array, text):
    np.save(tmp_path / "a.npy", array)
    samples = {key: tmp_path / "a.npy"}
    with pytest.raises(DataError) as caught:
        convert(request(towers, tmp_path / "m", samples=samples), None)
    assert text in caught.value.message
    assert not (tmp_path / "m").exists()


# --- what is no frozen graph --------------------------------------------------


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"", "a binary GraphDef is wanted"),
        (b"\0" * 64, "a binary GraphDef is wanted"),
        (b"node { name: 'a' op: 'b' }", "a binary GraphDef is wanted"),
        (os.urandom(4000), "a binary GraphDef is wanted"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "it is a Keras model"),
        (b"PK\x03\x04" + bytes(99), "it is a Keras model"),
        (b"\x1c\0\0\0TFL3" + bytes(99), "it is a TensorFlow Lite model"),
    ],
)
def test_other_files_are_refused_and_called_by_name(tmp_path, content, hint):
    path = tmp_path / "towers.pb"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        convert(request(path, tmp_path / "m"), None)
    assert caught.value.message == f"{path} is no frozen graph"
    assert hint in caught.value.hint
    assert not (tmp_path / "m").exists()


def test_a_saved_model_is_not_converted_again(tmp_path, towers):
    convert(request(towers, tmp_path / "m"), None)
    again = tmp_path / "m" / "1" / "saved_model.pb"
    with pytest.raises(DataError) as caught:
        convert(request(again, tmp_path / "n"), None)
    assert caught.value.hint.startswith("it is a SavedModel already")


def test_every_cut_of_a_graph_is_refused_or_converted_whole(tmp_path, towers):
    data = towers.read_bytes()
    for end in range(0, len(data), 7):
        path = tmp_path / "cut.pb"
        path.write_bytes(data[:end])
        try:
            made = convert(request(path, tmp_path / "m", version=end + 1), None)
        except DataError:
            assert not (tmp_path / "m").exists() or end > 7
        else:
            assert loaded(made.path / "saved_model.pb").meta_graphs[0].signature_def


def test_a_graph_beyond_two_gigabytes_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "big.pb"
    with path.open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(DataError, match="2147483648 bytes, more than the 2 GiB"):
        convert(request(path, tmp_path / "m"), None)


# --- whole or not at all ------------------------------------------------------


@pytest.mark.usefixtures("only_the_graph")
def test_nothing_stays_of_a_failure_however_deep_the_directory(tmp_path, towers):
    wanted = (SignatureRequest().with_output("nothing"),)
    with pytest.raises(DataError):
        convert(request(towers, tmp_path / "a/b/c", signatures=wanted), None)


@pytest.mark.usefixtures("only_the_graph")
def test_a_missing_graph(tmp_path):
    with pytest.raises(HostError, match="No such file"):
        convert(request(tmp_path / "none.pb", tmp_path / "a"), None)


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_what_is_there_already_is_not_touched(tmp_path, towers, kind):
    (tmp_path / "m").mkdir()
    target = tmp_path / "m" / "1"
    if kind == "directory":
        target.mkdir()
    elif kind == "file":
        target.write_bytes(b"mine")
    else:
        target.symlink_to("nowhere")
    with pytest.raises(DataError, match="1 exists already") as caught:
        convert(request(towers, tmp_path / "m"), None)
    assert "--model-version" in caught.value.hint
    assert os.listdir(tmp_path / "m") == ["1"]


def test_a_file_in_the_way(tmp_path, towers):
    (tmp_path / "m").write_bytes(b"")
    with pytest.raises(HostError, match="Not a directory"):
        convert(request(towers, tmp_path / "m"), None)
    with pytest.raises(HostError, match="Not a directory"):
        convert(request(towers, tmp_path / "m" / "n"), None)
    assert (tmp_path / "m").read_bytes() == b""


# --- the process with TensorFlow ----------------------------------------------


@pytest.fixture
def python(tmp_path):
    """Return a function that writes a program which says it has TensorFlow, and then acts."""

    def write(act: str) -> str:
        path = tmp_path / "towers.pb.python"
        path.write_text(f'#!/bin/sh\ncase "$2" in *find_spec*) exit 0;; esac\n{act}\n')
        path.chmod(0o755)
        return str(path)

    return write


HELLO = 'read line; echo \'{"version": "2.0"}\'; read line; '


@pytest.mark.parametrize(
    ("act", "kind", "text", "hint"),
    [
        (
            "echo no numpy >&2; exit 3",
            UnavailableError,
            "TensorFlow does not start: loading the model: TensorFlow ended with 3",
            "it said: no numpy",
        ),
        (
            HELLO + "echo F0000 rank 0 >&2; kill -ABRT $$",
            DataError,
            "loading the model: TensorFlow died of signal 6",
            "it said: F0000 rank 0",
        ),
        (
            HELLO + 'echo \'{"failed": "NotFoundError: Op type Own"}\'; read line',
            DataError,
            "TensorFlow cannot load the model: NotFoundError: Op type Own",
            "",
        ),
    ],
)
def test_a_tensorflow_that_fails_fails_the_conversion(
    tmp_path, towers, python, act, kind, text, hint
):
    command = find_tensorflow(python(act))
    with pytest.raises(kind) as caught:
        convert(request(towers, tmp_path / "m"), command)
    assert caught.value.message == text
    assert caught.value.hint == hint
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (
            {"unequal": "scores"},
            "signature s: the eager and the Session loader answer ",
        ),
        (
            {"eager": "no op", "session": ""},
            "only the eager loader cannot run it: no op",
        ),
        (
            {"eager": "", "session": "no w"},
            "only the Session loader cannot run it: no w",
        ),
    ],
)
def test_loaders_that_do_not_agree(answer, text):
    with pytest.raises(DataError) as caught:
        judge("s", answer, given=False)
    assert text in caught.value.message


def test_loaders_that_agree():
    assert judge("s", {"difference": 1e-7}, given=True) == Run(difference=1e-7)
    refused = {"eager": "too few", "session": "too few"}
    assert judge("s", refused, given=False) == Run(reason="too few")
    with pytest.raises(DataError, match="s refuses its sample: too few"):
        judge("s", refused, given=True)


@pytest.mark.parametrize(
    ("one", "other", "want"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.0, 2.0001], 5e-5),
        ([1.0, 2.0], [1.0, 2.001], None),
        ([1e-9, 1.0], [2e-9, 1.0], 1e-9),  # small beside the greatest value
        ([np.nan, np.inf], [np.nan, np.inf], 0.0),
        ([np.nan], [1.0], None),
        ([np.inf, 1.0], [np.inf, 2.0], None),
        ([1.0], [1.0, 1.0], None),
        ([], [], 0.0),
    ],
)
def test_how_much_answers_may_differ(one, other, want):
    checker = Checker.__new__(Checker)
    checker.np = np
    got = checker._difference(np.array(one), np.array(other))
    assert got == (want if want is None else pytest.approx(want, rel=0.01))


def test_whole_numbers_and_strings_may_not_differ():
    checker = Checker.__new__(Checker)
    checker.np = np
    assert checker._difference(np.array([1]), np.array([2])) is None
    assert (
        checker._difference(np.array([b"a"], object), np.array([b"b"], object)) is None
    )
    assert checker._difference(np.array([b"a"], object), np.array([b"a"], object)) == 0
    assert checker._difference(np.float16(1), np.float16(1.005)) == pytest.approx(
        0.005, rel=0.1
    )


def test_a_python_without_tensorflow_is_refused():
    with pytest.raises(UnavailableError, match="finds no TensorFlow") as caught:
        find_tensorflow("/bin/false")
    assert "--no-check" in caught.value.hint
    with pytest.raises(HostError, match="run /none: No such file"):
        find_tensorflow("/none")


def test_this_interpreters_tensorflow_is_found_without_importing_it():
    assert find_tensorflow() == (sys.executable, "-c")
    assert "tensorflow" not in sys.modules
