"""What metadata says, and inputs that do not fit it."""

from __future__ import annotations

import numpy as np
import pytest

from tdxd.errors import DataError, UsageError
from tdxd.host import tf_messages
from tdxd.user.signature import TensorSpec, check_inputs, input_specs, random_array

FLOAT, INT32, UINT8, INT8, STRING, BOOL = 1, 3, 4, 6, 7, 10


def signature(**inputs):
    """Return a SignatureDef: (type, sizes) by name; sizes None are not said, `?` is -1."""
    made = tf_messages.meta_graph().SignatureDef()
    for name, (dtype, sizes) in inputs.items():
        made.inputs[name].dtype = dtype
        if sizes is not None:
            made.inputs[name].tensor_shape.SetInParent()
            for size in sizes:
                made.inputs[name].tensor_shape.dim.add().size = size
    return made


def test_metadata_becomes_specs():
    made = signature(b=(FLOAT, (-1, 8)), a=(INT32, None), s=(STRING, ()))
    made.inputs["u"].dtype = FLOAT
    made.inputs["u"].tensor_shape.unknown_rank = True
    specs = input_specs(made)
    assert list(specs) == ["a", "b", "s", "u"]
    shapes = [spec.shape for spec in specs.values()]
    assert shapes == [None, (None, 8), (), None]
    assert str(specs["b"]) == "float [?, 8]"
    assert str(specs["a"]) == "int32 of unknown shape"


def test_what_fits_passes():
    want = signature(
        x=(FLOAT, (-1, 2)), s=(STRING, (-1,)), n=(INT32, ()), any=(1, None)
    )
    arrays = {
        "x": np.zeros((3, 2), np.float32),
        "s": np.array([b"a"], object),
        "n": np.array(1, np.int32),
        "any": np.zeros((1, 2, 3), np.float32),
    }
    check_inputs(arrays, want)


@pytest.mark.parametrize(
    ("array", "message", "hint"),
    [
        (
            np.zeros((1, 2, 3)),
            "input x: elements of type double; the model takes float [?, 2, 3]",
            "convert it before: array.astype('float32')",
        ),
        (
            np.array([["a"]]),
            "input x: elements of type string; the model takes float [?, 2, 3]",
            "text and numbers are not each other",
        ),
        (
            np.zeros((2, 3), np.float32),
            "input x: shape [2, 3]; the model takes float [?, 2, 3]",
            "the first axis counts the examples, also if there is one: array[None, ...]",
        ),
        (
            np.zeros((1, 3, 2), np.float32),
            "input x: shape [1, 3, 2]; the model takes float [?, 2, 3]",
            "compare with the model's signature: tdx-infer show",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_what_would(array, message, hint):
    with pytest.raises(DataError) as caught:
        check_inputs({"x": array}, signature(x=(FLOAT, (-1, 2, 3))))
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_missing_and_surplus_inputs():
    want = signature(x=(FLOAT, (-1,)), z=(FLOAT, (-1,)))
    x = np.zeros(1, np.float32)
    with pytest.raises(DataError, match=r"input z \(float \[\?\]\) is not given"):
        check_inputs({"x": x}, want)
    with pytest.raises(DataError, match="no input 'q' in the signature"):
        check_inputs({"x": x, "z": x, "q": x}, want)


def test_an_input_with_a_default_may_be_left_out():
    want = signature(x=(FLOAT, (-1,)), z=(FLOAT, (-1,)))
    want.defaults["z"].dtype = FLOAT
    check_inputs({"x": np.zeros(1, np.float32)}, want)


@pytest.mark.parametrize("dtype", [FLOAT, INT32, UINT8, INT8, BOOL])
def test_random_inputs_fit(dtype):
    spec = TensorSpec(name="x", dtype=dtype, shape=(None, 4, 5))
    array = random_array(spec, rows=3, shape=None)
    check_inputs({"x": array}, signature(x=(dtype, (-1, 4, 5))))
    assert array.shape == (3, 4, 5)
    assert len(np.unique(array)) > 1
    assert array.min() >= 0


def test_open_sizes_of_a_random_input_are_asked_for():
    spec = TensorSpec(name="x", dtype=FLOAT, shape=(None, None, None, 3))
    with pytest.raises(UsageError) as caught:
        random_array(spec, rows=1, shape=None)
    assert caught.value.hint == "--shape x=1,224,224,3 says them"
    assert random_array(spec, rows=2, shape=(None, 4, 5, 3)).shape == (2, 4, 5, 3)
    unknown = TensorSpec(name="x", dtype=FLOAT, shape=None)
    assert random_array(unknown, rows=2, shape=(7, 2)).shape == (7, 2)


@pytest.mark.parametrize("shape", [(None, 4, 5, 4), (1, 4, 5), ()])
def test_a_shape_that_the_model_does_not_take(shape):
    spec = TensorSpec(name="x", dtype=FLOAT, shape=(None, None, None, 3))
    with pytest.raises(UsageError, match="the model takes float"):
        random_array(spec, rows=1, shape=shape)


def test_what_is_not_made_up():
    text = TensorSpec(name="x", dtype=STRING, shape=(None,))
    with pytest.raises(DataError, match="text is not made up"):
        random_array(text, rows=1, shape=None)
    huge = TensorSpec(name="x", dtype=FLOAT, shape=(None, 1 << 40))
    with pytest.raises(UsageError, match="too much to make up"):
        random_array(huge, rows=1, shape=None)
