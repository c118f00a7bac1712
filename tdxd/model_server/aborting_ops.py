"""Finds operations of a loaded model that would end the process instead of failing.

oneDNN's convolutions, and TensorFlow's 3D pooling, check the rank of what they get with an
assertion: a tensor of another rank aborts the server, with all its models. Where the graph fixes
the rank, the check of each request against the signature is enough; where it leaves it open, a
request decides, and the model is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["open_rank"]

_ABORTS = frozenset(
    (
        "Conv2D",
        "Conv3D",
        "DepthwiseConv2dNative",
        "MaxPool3D",
        "_FusedConv2D",
        "_FusedConv3D",
        "_FusedDepthwiseConv2dNative",
    )
)
"""Tried one by one with tensors of ranks 0 to 6, under TensorFlow 2.21."""
_MAX_BODIES = 10_000
_FIRST_IS_CONDITION = frozenset(("If", "StatelessIf", "Case", "StatelessCase"))


def open_rank(function: Any) -> str:
    """Return which operation of a concrete function takes tensors of any rank; else nothing."""
    seen: set[tuple[str, tuple[int | None, ...]]] = set()
    graphs = [function.graph]
    while graphs and len(seen) < _MAX_BODIES:
        graph = graphs.pop()
        for op in graph.get_operations():
            if op.type in _ABORTS and op.inputs[0].shape.rank is None:
                return f"{op.type} {op.name}"
            for name, body in _bodies(graph, op):
                ranks = tuple(tensor.shape.rank for tensor in body.inputs)
                if (name, ranks) not in seen:
                    seen.add((name, ranks))
                    graphs.append(body)
    return ""


def _bodies(graph: Any, op: Any) -> Iterator[tuple[str, Any]]:
    """Yield name and graph of each function that an operation calls, for what it passes to it."""
    for attribute in op.node_def.attr.values():
        named = attribute.HasField("func")
        functions = [attribute.func] if named else attribute.list.func
        for one in functions:
            called = graph._get_function(one.name)  # noqa: SLF001 - nothing public tells
            if called is not None:
                yield one.name, _body(op, called)


def _body(op: Any, called: Any) -> Any:
    """Return a function's graph; with the caller's shapes where its own are open."""
    passed = list(op.inputs)
    if op.type in _FIRST_IS_CONDITION:
        passed = passed[1:]
    body = called.graph
    fits = len(passed) == len(body.inputs)
    if not fits or not any(
        own.shape.rank is None and given.shape.rank is not None
        for own, given in zip(body.inputs, passed, strict=True)
    ):
        return body
    from tensorflow.python.framework import function_def_to_graph

    definition = type(called.definition).FromString(
        called.definition.SerializeToString()
    )
    for arguments in definition.arg_attr.values():
        arguments.attr.pop("_output_shapes", None)
    shapes = [
        given.shape if own.shape.rank is None else own.shape
        for own, given in zip(body.inputs, passed, strict=True)
    ]
    return function_def_to_graph.function_def_to_graph(definition, input_shapes=shapes)
