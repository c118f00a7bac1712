"""Batches without TensorFlow: what is merged, what is not, and who gets which answer."""

from __future__ import annotations

import threading
import time
from concurrent import futures

import grpc
import numpy as np
import pytest

from tdxd.host import tf_messages
from tdxd.model_server.batching import (
    BatchLimits,
    BatchScheduler,
    batchable,
    batched,
    parse_batching,
)
from tdxd.model_server.failure import RpcFailure
from tdxd.model_server.flags import StartError, parse_flags
from tdxd.model_server.loading import Loading

DEADLINE_S = 30.0
INVALID = "INVALID_ARGUMENT"
FAILED = grpc.StatusCode.FAILED_PRECONDITION


class Model:
    """Doubles `x`, and remembers each execution; a negative number fails it."""

    def __init__(self, **limits):
        self.shapes: list[tuple[int, ...]] = []
        self.entered, self.gate = threading.Event(), threading.Event()
        self.gate.set()
        self.lines: list[str] = []
        self.limits = BatchLimits(**{"max_rows": 6, "timeout_s": DEADLINE_S, **limits})
        self.scheduler = BatchScheduler(1)
        self.answer = batched(self.run, self.scheduler, self.limits, self.lines.append)
        self.pool = futures.ThreadPoolExecutor(16)

    def run(self, inputs):
        x = inputs["x"]
        self.shapes.append(x.shape)
        self.entered.set()
        assert self.gate.wait(DEADLINE_S)
        if (x < 0).any():
            raise RpcFailure(FAILED, "negative")
        return {"y": x * 2}

    def send(self, *rows):
        return self.pool.submit(self.answer, {"x": np.array(rows, np.float32)})


@pytest.fixture
def make():
    made = []

    def make(**limits):
        made.append(Model(**limits))
        return made[-1]

    yield make
    for model in made:
        model.gate.set()
        model.scheduler.drain()
        model.pool.shutdown()


def got(call):
    return call.result(DEADLINE_S)["y"].tolist()


def failure(call):
    with pytest.raises(RpcFailure) as caught:
        call.result(DEADLINE_S)
    return caught.value.code.name, caught.value.text


def test_a_full_batch_is_executed_once_and_everybody_gets_their_own(make):
    model = make()
    calls = [model.send([n, n], [n + 10, n]) for n in range(3)]
    assert [got(call) for call in calls] == [
        [[2 * n, 2 * n], [2 * n + 20, 2 * n]] for n in range(3)
    ]
    assert model.shapes == [(6, 2)]


def test_what_waits_while_another_is_executed_is_merged(make):
    model = make(timeout_s=0.0)
    model.gate.clear()
    first = model.send([1])
    assert model.entered.wait(DEADLINE_S)
    rest = [model.send([n]) for n in range(2, 5)]
    while sum(batch.rows for batch in model.scheduler._waiting) < 3:
        time.sleep(0.001)  # they are on their way
    model.gate.set()
    assert [got(call) for call in (first, *rest)] == [[[2]], [[4]], [[6]], [[8]]]
    assert model.shapes == [(1, 1), (3, 1)]


def test_what_does_not_fit_together_is_not_merged(make):
    model = make(max_rows=2)
    calls = [model.send([1]), model.send([1, 2]), model.send([3]), model.send([3, 4])]
    assert [got(call) for call in calls] == [[[2]], [[2, 4]], [[6]], [[6, 8]]]
    assert sorted(model.shapes) == [(2, 1), (2, 2)]


def test_a_failure_is_only_its_own(make):
    model = make(max_rows=2)
    good, bad = model.send([1]), model.send([-1])
    assert got(good) == [[2]]
    assert failure(bad) == ("FAILED_PRECONDITION", "negative")


def test_a_batch_is_padded_to_an_allowed_size(make):
    model = make(max_rows=4, sizes=(2, 4), timeout_s=0.0)
    assert got(model.send([1], [2], [3])) == [[2], [4], [6]]
    assert model.shapes == [(4, 1)]


def test_an_answer_with_other_rows_ends_batching(make):
    model = make(max_rows=2)
    model.answer = batched(
        lambda inputs: {"total": inputs["x"].sum()},
        model.scheduler,
        model.limits,
        model.lines.append,
    )
    calls = [model.send([1]), model.send([5])]
    assert [call.result(DEADLINE_S)["total"] for call in calls] == [1, 5]
    assert model.send([7]).result(DEADLINE_S)["total"] == 7  # waits for nobody
    assert model.lines == [
        "No batching from here on: output total of a batch of 2 has the shape []"
    ]


def test_an_unexpected_error_reaches_every_caller(make):
    model = make(max_rows=2)

    def broken(_inputs):
        raise ZeroDivisionError

    model.answer = batched(broken, model.scheduler, model.limits, model.lines.append)
    calls = [model.send([1]), model.send([2])]
    for call in calls:
        with pytest.raises(ZeroDivisionError):
            call.result(DEADLINE_S)


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (
            {"x": np.zeros((7, 1))},
            "Task size 7 is larger than maximum input batch size 6",
        ),
        (
            {"x": np.zeros(())},
            "Batching Run() input tensors must have at least one dimension",
        ),
        (
            {"x": np.zeros((1, 1)), "z": np.zeros((2, 1))},
            "Batching Run() input tensors must have equal 0th-dimension size",
        ),
    ],
)
def test_what_cannot_be_batched_is_refused(make, inputs, text):
    with pytest.raises(RpcFailure) as caught:
        make().answer(inputs)
    assert (caught.value.code.name, caught.value.text) == (INVALID, text)


def test_a_full_queue_is_unavailable(make):
    model = make(max_rows=1, max_waiting=1)
    model.gate.clear()
    first = model.send([1])
    assert model.entered.wait(DEADLINE_S)
    second = model.send([2])
    while not model.scheduler._waiting:
        time.sleep(0.001)  # it is on its way
    third = model.send([3])
    assert failure(third) == (
        "UNAVAILABLE",
        "The batch scheduling queue to which this task was submitted is full",
    )
    model.gate.set()
    assert [got(first), got(second)] == [[[2]], [[4]]]


def test_draining_lets_nobody_wait(make):
    model = make()
    call = model.send([1])
    model.scheduler.drain()
    assert got(call) == [[2]]
    assert got(model.send([2])) == [[4]]


# --- what may be batched, and how ----------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "can"),
    [([-1, 4], True), ([], False), ([1, 4], False), (None, True)],
)
def test_signatures_that_can_be_batched(sizes, can):
    made = tf_messages.meta_graph().SignatureDef()
    made.inputs["x"].tensor_shape.dim.add().size = -1
    if sizes is None:
        made.outputs["y"].tensor_shape.unknown_rank = True
    else:
        made.outputs["y"].tensor_shape.SetInParent()
        for size in sizes:
            made.outputs["y"].tensor_shape.dim.add().size = size
    assert batchable(made) is can


def test_parameters():
    text = (
        "max_batch_size { value: 8 } batch_timeout_micros { value: 1500 } "
        "max_enqueued_batches { value: 3 } num_batch_threads { value: 2 } "
        'thread_pool_name { value: "x" } allowed_batch_sizes: 4 allowed_batch_sizes: 8'
    )
    assert parse_batching(text, source="f") == BatchLimits(
        max_rows=8, timeout_s=0.0015, max_waiting=3, threads=2, sizes=(4, 8)
    )


def test_parameters_left_out_are_the_originals():
    limits = parse_batching("", source="f")
    assert (limits.max_rows, limits.timeout_s, limits.max_waiting) == (1000, 0.0, 10)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", "f: "),
        ("max_batch_size { value: 0 }", "f: max_batch_size is 0, expected 1 or more"),
        ("batch_timeout_micros { value: -1 }", "f: batch_timeout_micros is -1"),
        ("pad_variable_length_inputs: true", "f: pad_variable_length_inputs is not"),
        (
            "allowed_batch_sizes: 4",
            "f: allowed_batch_sizes are [4]; expected ascending",
        ),
        (
            "max_batch_size { value: 2 } allowed_batch_sizes: 2 allowed_batch_sizes: 2",
            "f: allowed_batch_sizes are [2, 2]; expected ascending, the last equal to",
        ),
    ],
)
def test_bad_parameters(text, words):
    with pytest.raises(StartError) as caught:
        parse_batching(text, source="f")
    assert caught.value.message.startswith(words)


# --- parameters of one model ----------------------------------------------------


def loading(*flags):
    base = ["--model_base_path=/m", "--enable_batching"]
    return Loading(parse_flags([*base, *flags]), log=lambda _line: None)


def test_a_models_own_parameters(tmp_path):
    one = loading("--enable_per_model_batching_parameters")
    assert one._limits_of(str(tmp_path)) is None  # it is not batched
    own = tmp_path / "batching_params.pbtxt"
    own.write_text("max_batch_size { value: 3 }")
    limits = one._limits_of(str(tmp_path))
    assert limits is not None
    assert limits.max_rows == 3
    own.write_text("nonsense")
    with pytest.raises(RpcFailure, match=r"batching_params\.pbtxt: "):
        one._limits_of(str(tmp_path))


def test_the_parameters_of_all_models(tmp_path):
    file = tmp_path / "parameters"
    file.write_text("max_batch_size { value: 5 }")
    limits = loading(f"--batching_parameters_file={file}")._limits_of(str(tmp_path))
    assert limits is not None
    assert limits.max_rows == 5
    with pytest.raises(StartError, match="No such file"):
        loading(f"--batching_parameters_file={tmp_path / 'none'}")
