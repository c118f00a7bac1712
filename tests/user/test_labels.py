"""Names of classes, and the greatest scores."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tdxd.errors import DataError, HostError
from tdxd.user.labels import read_labels, top_k


def test_lines_and_both_kinds_of_json(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("tench\n great white \n\ncat\n\n")
    assert read_labels(str(path)) == ["tench", "great white", "", "cat"]
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(["a", "b"]))
    assert read_labels(str(path)) == ["a", "b"]
    path.write_text(json.dumps({"1": ["n2", "cat"], "0": ["n1", "tench"]}))
    assert read_labels(str(path)) == ["tench", "cat"]


@pytest.mark.parametrize(
    "text", ["", "[", "3", '{"a": "b"}', "[1]", '["a", null]', "[[]]"]
)
def test_bad_json(tmp_path, text):
    path = tmp_path / "labels.json"
    path.write_text(text)
    with pytest.raises(DataError, match="not a list of labels"):
        read_labels(str(path))


def test_files_without_labels(tmp_path):
    path = tmp_path / "labels.txt"
    with pytest.raises(HostError):
        read_labels(str(path))
    path.write_text("\n\n")
    with pytest.raises(DataError, match="no labels in it"):
        read_labels(str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        read_labels(str(path))


def test_greatest_first_equal_ones_by_index_nan_last():
    scores = np.array([[0.1, 0.7, 0.7, np.nan], [1, 2, 3, 4]], np.float32)
    made = top_k("y", scores, 9)
    assert [one.index for one in made[0]] == [1, 2, 0, 3]
    assert [one.index for one in made[1]] == [3, 2, 1, 0]
    two = top_k("y", np.array([3, 200, 7], np.uint8), 2, ["a", "b", "c"])
    assert [(one.label, one.score) for one in two[0]] == [("b", 200.0), ("c", 7.0)]


def test_as_many_labels_as_classes():
    with pytest.raises(DataError) as caught:
        top_k("y", np.zeros((1, 1001)), 5, ["a"] * 1000)
    assert (
        caught.value.message == "output y has 1001 classes, but there are 1000 labels"
    )


@pytest.mark.parametrize(
    "scores", [np.zeros((1, 2, 3)), np.array(1.0), np.array([b"a"], object)]
)
def test_what_has_no_greatest(scores):
    with pytest.raises(DataError, match="is no list of scores"):
        top_k("y", scores, 1)
