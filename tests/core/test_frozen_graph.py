"""Inputs and outputs found in graphs, and what is left of a graph for them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core.frozen_graph import FrozenGraph, TensorRef, shape_text
from tdxd.core.op_types import output_types
from tdxd.core.signature import (
    SignatureRequest,
    TensorRequest,
    resolve,
    write_signature,
)
from tdxd.errors import DataError, TdxdError, UsageError
from tdxd.host import tf_messages
from tests.graphs import (
    FLOAT,
    INT32,
    INT64,
    STRING,
    graph,
    node,
    placeholder,
    two_towers,
)

RESOURCE = 20


def indexed(message) -> FrozenGraph:
    return FrozenGraph(message, source="g.pb")


def names(message) -> list[str]:
    return [one.name for one in message.node]


def shown(endpoints) -> list[tuple[str, str, int, object]]:
    return [(one.key, str(one.ref), one.dtype, one.shape) for one in endpoints]


def found(*nodes, producer=1882, request=None):
    return resolve(
        indexed(graph(*nodes, producer=producer)), request or SignatureRequest()
    )


# --- what is found ------------------------------------------------------------


def test_inputs_and_outputs_are_found_with_keys_types_and_shapes():
    made = resolve(indexed(two_towers()), SignatureRequest())
    assert shown(made.inputs) == [
        ("left", "left:0", FLOAT, (None, 4)),
        ("right", "tower/right:0", FLOAT, (None, 4)),
    ]
    assert shown(made.outputs) == [
        ("topk", "topk:0", FLOAT, None),
        ("topk_1", "topk:1", INT32, None),
        ("am", "am:0", INT64, None),
    ]


def test_nodes_of_one_name_in_two_scopes_get_keys_of_their_own():
    made = found(
        placeholder("a/x"),
        placeholder("b/x"),
        placeholder("1-z"),
        node("y", "AddN", "a/x", "b/x", "1-z", types={"T": FLOAT}, N=3),
    )
    assert [one.key for one in made.inputs] == ["x", "b_x", "_1_z"]


def test_what_depends_on_no_placeholder_or_gives_nothing_is_no_output():
    made = found(
        placeholder("x"),
        node("orphan", "Const", types={"dtype": FLOAT}),
        node("same", "Identity", "orphan", types={"T": FLOAT}),
        node("y", "Relu", "x", types={"T": FLOAT}),
        node("done", "NoOp", "^y"),
        node("watch", "Assert", "x", "same"),
    )
    assert [str(one.ref) for one in made.outputs] == ["y:0"]


def test_what_a_loop_waits_for_is_no_output():
    made = found(
        placeholder("x"),
        node("enter", "Enter", "x", types={"T": FLOAT}),
        node("merge", "Merge", "enter", "next", types={"T": FLOAT}, N=2),
        node("anchor", "Identity", "merge", types={"T": FLOAT}),
        node("group", "NoOp", "^anchor"),
        node("one", "Const", "^group", types={"dtype": FLOAT}),
        node("add", "AddV2", "merge", "one", types={"T": FLOAT}),
        node("next", "NextIteration", "add", types={"T": FLOAT}),
        node("exit", "Exit", "merge", types={"T": FLOAT}),
        node("watch", "Assert", "exit"),
    )
    assert [str(one.ref) for one in made.outputs] == ["exit:0"]


def test_an_optional_placeholder_keeps_its_default():
    made = found(
        placeholder("x"),
        node("one", "Const", types={"dtype": FLOAT}),
        node("keep", "PlaceholderWithDefault", "one", types={"dtype": FLOAT}, shape=()),
        node("y", "Mul", "x", "keep", types={"T": FLOAT}),
    )
    assert [one.key for one in made.inputs] == ["x"]


@pytest.mark.parametrize(
    ("shape", "producer", "want"),
    [
        ((-1, 4), 1882, (None, 4)),
        ((), 1882, ()),
        ((), 21, None),
        ((2,), 21, (2,)),
        (None, 1882, None),
    ],
)
def test_a_placeholders_shape(shape, producer, want):
    made = found(
        placeholder("x", shape),
        node("y", "Relu", "x", types={"T": FLOAT}),
        producer=producer,
    )
    assert made.inputs[0].shape == want


def test_a_shape_that_the_graph_notes_is_taken():
    message = graph(placeholder("x"), node("y", "Relu", "x", types={"T": FLOAT}))
    shape = message.node[1].attr["_output_shapes"].list.shape.add()
    shape.dim.add().size = -1
    shape.dim.add().size = 4
    assert resolve(indexed(message), SignatureRequest()).outputs[0].shape == (None, 4)


@pytest.mark.parametrize(
    ("made", "want"),
    [
        (node("n", "Softmax", types={"T": FLOAT}), (FLOAT,)),
        (node("n", "Softmax"), (0,)),
        (node("n", "ArgMax"), (INT64,)),
        (node("n", "ArgMax", types={"output_type": INT32}), (INT32,)),
        (node("n", "Cast", types={"SrcT": FLOAT, "DstT": STRING}), (STRING,)),
        (node("n", "Split", types={"T": FLOAT}, num_split=3), (FLOAT,) * 3),
        (node("n", "Split", types={"T": FLOAT}, num_split=-3), ()),
        (node("n", "NonMaxSuppressionV3"), (INT32,)),
        (node("n", "StopGradient", types={"T": FLOAT}), (FLOAT,)),
        (node("n", "NoOp"), ()),
        (node("n", "SomebodysOwn"), None),
    ],
)
def test_types_of_outputs(made, want):
    assert output_types(graph(made).node[0], {}) == want


def test_types_of_lists_and_of_functions():
    message = graph(node("n", "While"), node("f", "mine", types={"U": STRING}))
    message.node[0].attr["T"].list.type[:] = [FLOAT, INT32]
    function = message.library.function.add()
    function.signature.name = "mine"
    function.signature.output_arg.add(type=INT64)
    function.signature.output_arg.add(type_attr="U")
    assert output_types(message.node[0], {}) == (FLOAT, INT32)
    assert output_types(message.node[1], {"mine": function}) == (INT64, STRING)


def test_looking_changes_nothing():
    message = two_towers()
    before = message.SerializeToString(deterministic=True)
    resolve(indexed(message), SignatureRequest())
    assert message.SerializeToString(deterministic=True) == before


# --- what is asked for --------------------------------------------------------


def asked(*, inputs=(), outputs=(), message=None):
    request = SignatureRequest()
    for one in inputs:
        request = request.with_input(one)
    for one in outputs:
        request = request.with_output(one)
    return resolve(indexed(message or two_towers()), request)


def test_keys_tensors_and_shapes_of_ones_own():
    made = asked(
        inputs=["x=left", "y=tower/right:0[2,?]"], outputs=["best=topk:1", "am"]
    )
    assert shown(made.inputs) == [
        ("x", "left:0", FLOAT, (None, 4)),
        ("y", "tower/right:0", FLOAT, (2, None)),
    ]
    assert [one.key for one in made.outputs] == ["best", "am"]


@pytest.mark.parametrize(
    ("inputs", "outputs", "text", "hint"),
    [
        ([], ["softmax"], "output softmax:0: g.pb has no such node", "there is: "),
        ([], ["topk:2"], "topk (TopKV2) gives 2 tensors", "the last one is topk:1"),
        ([], ["^am"], "^am is a control output", "name a node that gives a tensor"),
        ([], [""], "'' names no tensor", "write NODE or NODE:INDEX"),
        ([], ["a:b"], "'a:b' names no tensor", "write NODE or NODE:INDEX"),
        ([], ["9=am"], "key '9' is no name", "letters, digits and _"),
        ([], ["x=am", "x=topk"], "output x is named twice", "choose another KEY="),
        ([], ["am[4]"], "the shape of an output is the graph's own", ""),
        (["left"], [], "the outputs depend on tower/right:0, too", "name every input"),
        (["lift"], [], "input lift:0: g.pb has no such node", "there is: left"),
        (["left[x]"], [], "left[x]: 'x' is no size", "? for one that is not fixed"),
        ([], ["k"], "no placeholder goes into k:0", "name the input with --input"),
        (["topk"], ["am"], "depend on left:0, tower/right:0, too", "name every input"),
    ],
)
def test_what_cannot_be_given_is_refused(inputs, outputs, text, hint):
    with pytest.raises(TdxdError) as caught:
        asked(inputs=inputs, outputs=outputs)
    assert isinstance(caught.value, DataError | UsageError)
    assert text in caught.value.message
    assert caught.value.hint.startswith(hint) or hint in caught.value.hint


def test_a_node_without_a_tensor_is_no_output():
    message = graph(placeholder("x"), node("init", "NoOp", "^x"))
    with pytest.raises(DataError, match=r"init \(NoOp\) gives no tensor"):
        asked(outputs=["init"], message=message)


def test_a_graph_without_placeholders_is_refused_until_an_input_is_named():
    message = graph(
        node("file", "Const", types={"dtype": FLOAT}),
        node("y", "Relu", "file", types={"T": FLOAT}),
    )
    with pytest.raises(DataError, match="nothing in the graph depends on a placehol"):
        asked(message=message)
    made = asked(inputs=["x=file[?,2]"], outputs=["y"], message=message)
    assert shown(made.inputs) == [("x", "file:0", FLOAT, (None, 2))]


def test_a_handle_of_a_variable_is_no_input():
    message = graph(
        placeholder("v", (), RESOURCE),
        placeholder("x"),
        node("read", "ReadVariableOp", "v", types={"dtype": FLOAT}),
        node("y", "Mul", "x", "read", types={"T": FLOAT}),
    )
    with pytest.raises(DataError, match=r"v:0 .* is a resource handle") as caught:
        asked(message=message)
    assert "freeze it first" in caught.value.hint


# --- what is left -------------------------------------------------------------


def pruned(message, *requests: SignatureRequest) -> Any:
    index = indexed(message)
    index.prune([resolve(index, one).refs() for one in requests])
    return message


def request(*outputs: str, inputs: tuple[str, ...] = ()) -> SignatureRequest:
    return SignatureRequest(
        inputs=tuple(TensorRequest.parse(one) for one in inputs),
        outputs=tuple(TensorRequest.parse(one) for one in outputs),
    )


def test_only_what_outputs_need_stays_and_nothing_names_a_device():
    message = pruned(two_towers(), request("am"))
    assert names(message) == ["left", "tower/right", "sum", "deep/out", "axis", "am"]
    assert {one.device for one in message.node} == {""}


def test_what_is_waited_for_stays():
    message = graph(
        placeholder("x"),
        node("check", "Assert", "x"),
        node("y", "Relu", "x", "^check", types={"T": FLOAT}),
        node("late", "NoOp", "^y"),
    )
    assert names(pruned(message, request("y"))) == ["x", "check", "y"]


def test_an_input_in_the_middle_becomes_a_placeholder():
    message = pruned(two_towers(), request("am", inputs=("deep/out[?,4]",)))
    assert names(message) == ["deep/out", "axis", "am"]
    cut = message.node[0]
    assert (cut.op, list(cut.input), cut.attr["dtype"].type) == (
        "Placeholder",
        [],
        FLOAT,
    )
    assert [one.size for one in cut.attr["shape"].shape.dim] == [-1, 4]


def test_an_input_that_another_signature_computes_stays_as_it_is():
    message = pruned(two_towers(), request("am", inputs=("deep/out",)), request("topk"))
    assert {one.name: one.op for one in message.node}["deep/out"] == "Softmax"


def test_one_of_several_outputs_of_a_node_cannot_be_an_input():
    message = graph(
        placeholder("x"),
        node("both", "Split", "x", types={"T": FLOAT}, num_split=2),
        node("y", "Add", "both", "both:1", types={"T": FLOAT}),
    )
    with pytest.raises(DataError, match="both gives several tensors"):
        pruned(message, request("y", inputs=("both",)))


def test_an_input_of_unknown_type_cannot_begin_a_graph():
    message = graph(
        placeholder("x"),
        node("own", "SomebodysOwn", "x"),
        node("y", "Relu", "own", types={"T": FLOAT}),
    )
    with pytest.raises(DataError, match=r"element type of own \(SomebodysOwn\)"):
        pruned(message, request("y", inputs=("own",)))


def test_only_functions_that_are_called_stay():
    message = graph(placeholder("x"), node("y", "PartitionedCall", "x"))
    message.node[1].attr["f"].func.name = "outer"
    message.node[1].attr["Tout"].list.type.append(FLOAT)
    for name, calls in (("outer", "inner"), ("inner", "Relu"), ("lost", "VarHandleOp")):
        function = message.library.function.add()
        function.signature.name = name
        function.node_def.add(name="n", op=calls, device="/gpu:0")
    message.library.gradient.add(function_name="lost", gradient_func="inner")
    pruned(message, request("y"))
    kept = message.library.function
    assert [one.signature.name for one in kept] == ["outer", "inner"]
    assert {one.node_def[0].device for one in kept} == {""}
    assert not message.library.gradient


@pytest.mark.parametrize(
    ("op", "text"),
    [
        ("VariableV2", "a variable, so the graph is not frozen"),
        ("VarHandleOp", "a variable, so the graph is not frozen"),
        ("HashTableV2", "a lookup table, which nothing fills"),
        ("FIFOQueueV2", "a source of training data"),
        ("IteratorV2", "a source of training data"),
    ],
)
def test_what_is_not_constant_is_refused(op, text):
    message = graph(
        placeholder("x"),
        node("w", op),
        node("y", "Mul", "x", "w", types={"T": FLOAT}),
    )
    with pytest.raises(DataError) as caught:
        pruned(message, request("y"))
    assert caught.value.message == f"g.pb: node w ({op}) is {text}"
    assert caught.value.hint


def test_a_variable_in_a_function_is_found():
    message = graph(placeholder("x"), node("y", "mine", "x"))
    function = message.library.function.add()
    function.signature.name = "mine"
    function.signature.output_arg.add(type=FLOAT)
    function.node_def.add(name="w", op="VarHandleOp")
    with pytest.raises(DataError, match=r"node w .* not frozen"):
        pruned(message, request("y"))


def test_what_feeds_a_named_input_need_not_be_constant():
    message = graph(
        node("queue", "FIFOQueueV2"),
        node("image", "Identity", "queue", types={"T": FLOAT}),
        node("y", "Relu", "image", types={"T": FLOAT}),
    )
    assert names(pruned(message, request("y", inputs=("image",)))) == ["image", "y"]


def test_a_missing_node_is_named():
    message = graph(placeholder("x"), node("y", "Add", "x", "gone:0"))
    with pytest.raises(DataError, match="node y takes gone, which is missing"):
        asked(outputs=["y"], message=message)


def test_loops_of_control_flow_end():
    message = graph(
        placeholder("x"),
        node("enter", "Enter", "x", types={"T": FLOAT}),
        node("merge", "Merge", "enter", "next", types={"T": FLOAT}, N=2),
        node("next", "NextIteration", "merge", types={"T": FLOAT}),
        node("exit", "Exit", "merge", types={"T": FLOAT}),
    )
    made = resolve(indexed(message), SignatureRequest())
    assert [str(one.ref) for one in made.outputs] == ["exit:0"]
    assert len(names(pruned(message, SignatureRequest()))) == 5


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (graph(), "holds no nodes"),
        (graph(node("", "Relu")), "its node '' has no operation or is there twice"),
        (graph(node("a", "")), "its node 'a' has no operation"),
        (graph(node("a", "Relu"), node("a", "Relu")), "is there twice"),
    ],
)
def test_what_is_no_graph(message, text):
    with pytest.raises(DataError, match=text):
        indexed(message)


def test_a_signature_needs_every_type():
    made = found(placeholder("x"), node("y", "SomebodysOwn", "x"))
    assert made.outputs[0].dtype == 0
    with pytest.raises(DataError, match="element type of y:0 is not known") as caught:
        write_signature(tf_messages.meta_graph().SignatureDef(), made)
    assert "--no-check" in caught.value.hint


def test_shapes_as_people_write_them():
    assert [shape_text(one) for one in (None, (), (None, 3))] == ["[…]", "[]", "[?,3]"]


@given(st.text(max_size=20))
def test_any_text_names_a_tensor_or_is_refused(text):
    try:
        made = TensorRequest.parse(text)
    except (DataError, UsageError):
        return
    assert TensorRef.parse(str(made.ref)) == made.ref


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcde"),
            st.sampled_from(["Placeholder", "Relu", "Split", "NoOp", "Own"]),
            st.lists(
                st.sampled_from(["a", "b:1", "^c", "d:x", "e:", ":", ""]), max_size=3
            ),
        ),
        max_size=6,
    )
)
def test_any_graph_is_resolved_and_pruned_or_refused(nodes):
    message = graph(*(node(name, op, *inputs) for name, op, inputs in nodes))
    try:
        pruned(message, SignatureRequest())
    except (DataError, UsageError):
        return
    index = indexed(message)
    assert resolve(index, SignatureRequest()).outputs
