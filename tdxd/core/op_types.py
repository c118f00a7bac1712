"""The element types that a node of a graph gives, found without TensorFlow.

Nodes and functions are protobuf's messages NodeDef and FunctionDef, brought by the caller.
Source: tensorflow/core/framework/op_def.proto (OpDef.ArgDef), node_def.proto.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from tdxd.core.op_outputs import TABLE

__all__ = ["DT_INVALID", "functions_named_by", "output_types"]

DT_INVALID = 0
"""DataType's zero: here, a type that is not known."""

_MAX_OUTPUTS = 4096


@functools.cache
def _outputs_of_operations() -> Mapping[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    outputs: tuple[str, ...] = ()
    for line in TABLE.splitlines():
        head, colon, names = line.rpartition(":")
        if colon:
            outputs = tuple(head.split())
        found |= dict.fromkeys(names.split(), outputs)
    return found


def output_types(node: Any, functions: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the DataType number of each output of a node; None for an operation not known here.

    `functions` are those of the graph's library, which are operations, too. A type that an
    attribute should say, but does not, is DT_INVALID.
    """
    if node.op in functions:
        arguments = functions[node.op].signature.output_arg
        return tuple(_type_of_argument(node, one) for one in arguments)
    outputs = _outputs_of_operations().get(node.op)
    if outputs is None:
        return None
    found: list[int] = []
    for one in outputs:
        found += _types(node, one)
    return tuple(found)


def _type_of_argument(node: Any, argument: Any) -> int:
    if argument.type_attr:
        return _attribute_type(node, argument.type_attr, DT_INVALID)
    number: int = argument.type
    return number


def _types(node: Any, output: str) -> Iterable[int]:
    """Return the types that one entry of the table stands for."""
    count, star, kind = output.rpartition("*")
    if star and not count:
        return list(node.attr[kind].list.type) if kind in node.attr else []
    name, _, default = kind.partition("=")
    if name.isdigit():
        number = int(name)
    else:
        number = _attribute_type(node, name, int(default or DT_INVALID))
    repeated = node.attr[count].i if star and count in node.attr else 1
    return [number] * min(max(repeated, 0), _MAX_OUTPUTS)


def _attribute_type(node: Any, name: str, default: int) -> int:
    # Looking up a name that is not there would add it to the message.
    number: int = node.attr[name].type if name in node.attr else default
    return number


def functions_named_by(node: Any) -> Iterable[str]:
    """Yield the functions that a node may call: its operation, and those in its attributes."""
    yield node.op
    for value in node.attr.values():
        if value.HasField("func"):
            yield value.func.name
        for one in value.list.func:
            yield one.name
