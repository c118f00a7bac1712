"""Input tensors from files and JSON."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

from tdxd.errors import DataError, HostError, TdxdError, UsageError
from tdxd.host import tf_messages
from tdxd.user.inputs import as_batch, json_value, name_inputs, read_input


def signature(**inputs):
    made = tf_messages.meta_graph().SignatureDef()
    for name, dtype in inputs.items():
        made.inputs[name].dtype = dtype
    return made


FLOAT, INT32, UINT8, STRING, COMPLEX64, BOOL = 1, 3, 4, 7, 8, 10


def test_npy_with_and_without_a_name(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(3))
    assert list(read_input(str(path), None)) == [None]
    assert read_input(f"x={path}", None)["x"].tolist() == [0, 1, 2]


def test_json_from_stdin_and_from_a_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": [1], "b": 2}')
    assert read_input(str(path), None) == {"a": [1], "b": 2}
    assert read_input("-", io.StringIO("[1, 2]")) == {None: [1, 2]}
    assert read_input("x=-", io.StringIO("[1, 2]")) == {"x": [1, 2]}


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (None, HostError, "No such file"),
        (b"PK\x03\x04", DataError, "not a .npy file of plain values"),
        (b"", DataError, "not a .npy file of plain values"),
    ],
)
def test_bad_npy(tmp_path, content, kind, words):
    path = tmp_path / "a.npy"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(kind) as caught:
        read_input(str(path), None)
    assert words in caught.value.message


def test_a_pickle_in_npy_is_not_run(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"not a \.npy file of plain values"):
        read_input(str(path), None)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000])
def test_bad_json(text):
    with pytest.raises(DataError, match="-: not JSON"):
        read_input("-", io.StringIO(text))


@pytest.mark.parametrize("argument", ["", "x="])
def test_no_file(argument):
    with pytest.raises(UsageError, match="no file"):
        read_input(argument, None)


@pytest.mark.parametrize(
    ("dtype", "value", "want"),
    [
        (FLOAT, [1, 2.5], np.array([1, 2.5], "f4")),
        (INT32, [[1], [2]], np.array([[1], [2]], "i4")),
        (STRING, ["a", "b"], np.array(["a", "b"], object)),
        (BOOL, True, np.array(True)),
        (COMPLEX64, [1.5], np.array([1.5], "c8")),
    ],
)
def test_json_takes_the_signatures_type(dtype, value, want):
    array = name_inputs({None: value}, signature(x=dtype))["x"]
    assert array.dtype == want.dtype
    assert array.tolist() == want.tolist()


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (INT32, [1.5]),
        (UINT8, [256]),
        (FLOAT, ["1.5"]),
        (FLOAT, [None]),
        (FLOAT, [[1], [2, 3]]),
        (BOOL, [1]),
        (STRING, [1]),
        (99, [1]),
    ],
)
def test_json_that_does_not_fit_is_refused(dtype, value):
    with pytest.raises(DataError):
        name_inputs({"x": value}, signature(x=dtype))


def test_a_named_array_needs_no_signature():
    array = np.zeros(3)
    assert name_inputs({"x": array}, None) == {"x": array}


@pytest.mark.parametrize(
    ("given", "text", "hint"),
    [
        (
            {None: [1]},
            "the signature has 2 inputs (a, b)",
            "name each: --input NAME=FILE.npy",
        ),
        ({"c": [1]}, "no input 'c' in the signature", "it has: a, b"),
    ],
)
def test_names_that_do_not_fit(given, text, hint):
    with pytest.raises(TdxdError) as caught:
        name_inputs(given, signature(b=FLOAT, a=FLOAT))
    assert (caught.value.message, caught.value.hint) == (text, hint)


def test_a_batch_repeats_rows_in_turn_or_cuts():
    array = np.array([[1], [2], [3]])
    assert as_batch(array, 7)[:, 0].tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert as_batch(array, 2)[:, 0].tolist() == [1, 2]


@pytest.mark.parametrize("array", [np.float32(1).reshape(()), np.zeros((0, 3))])
def test_no_rows_no_batch(array):
    with pytest.raises(DataError, match="has no rows"):
        as_batch(array, 2)


@pytest.mark.parametrize(
    ("array", "want"),
    [
        (np.array([[1.5]], "f4"), [[1.5]]),
        (np.array([b"a", b"\xff"], object), ["a", {"b64": "/w=="}]),
        (np.array(b"a", object), "a"),
        (np.array([1 + 2j]), [[1.0, 2.0]]),
        (np.array(True), True),
    ],
)
def test_json_values(array, want):
    assert json.loads(json.dumps(json_value(array))) == want
