"""Builds GraphDef messages without TensorFlow."""

from __future__ import annotations

from typing import Any

from tdxd.host import tf_messages

__all__ = [
    "FLOAT",
    "INT32",
    "INT64",
    "STRING",
    "frozen",
    "graph",
    "node",
    "placeholder",
    "two_towers",
]

FLOAT, INT32, STRING, INT64 = 1, 3, 7, 9
PRODUCER = 1882
"""Of a recent TensorFlow; for those up to 21 the shape [] means none."""


def node(
    name: str,
    op: str,
    *inputs: str,
    types: dict[str, int] | None = None,
    shape: tuple[int, ...] | None = None,
    **integers: int,
) -> dict[str, Any]:
    """Describe a node; `shape` is a placeholder's, -1 for a size that is not fixed."""
    return {
        "name": name,
        "op": op,
        "inputs": inputs,
        "types": types or {},
        "shape": shape,
        "integers": integers,
    }


def graph(*nodes: dict[str, Any], producer: int = PRODUCER) -> Any:
    """Make a GraphDef of described nodes."""
    made = tf_messages.saved_model().SavedModel().meta_graphs.add().graph_def
    made.versions.producer = producer
    for one in nodes:
        message = made.node.add(name=one["name"], op=one["op"])
        message.input[:] = one["inputs"]
        for key, number in one["types"].items():
            message.attr[key].type = number
        for key, value in one["integers"].items():
            message.attr[key].i = value
        if one["shape"] is not None:
            message.attr["shape"].shape.SetInParent()
            for size in one["shape"]:
                message.attr["shape"].shape.dim.add().size = size
    return made


def placeholder(
    name: str, shape: tuple[int, ...] | None = (-1, 4), dtype: int = FLOAT
) -> dict[str, Any]:
    return node(name, "Placeholder", types={"dtype": dtype}, shape=shape)


def two_towers() -> Any:
    """Make a graph that runs: two inputs, three outputs, a third placeholder for nothing."""
    made = graph(
        placeholder("left"),
        placeholder("tower/right"),
        placeholder("unused"),
        node("sum", "AddV2", "left", "tower/right", types={"T": FLOAT}),
        node("deep/out", "Softmax", "sum", types={"T": FLOAT}),
        node("k", "Const", types={"dtype": INT32}),
        node("topk", "TopKV2", "deep/out", "k", types={"T": FLOAT}),
        node("axis", "Const", types={"dtype": INT32}),
        node("am", "ArgMax", "deep/out:0", "axis", types={"T": FLOAT}),
    )
    for one in made.node:
        if one.op == "Const":
            value = one.attr["value"].tensor
            value.dtype = INT32
            value.tensor_shape.SetInParent()
            value.int_val.append({"k": 2, "axis": 1}[one.name])
        one.device = "/device:GPU:0"
    return made


def frozen(message: Any, path: Any) -> Any:
    """Write a GraphDef to a file; return its path."""
    path.write_bytes(message.SerializeToString())
    return path
