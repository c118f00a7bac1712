"""A frozen graph: what goes in, what comes out, and what is needed in between.

The graph is protobuf's message GraphDef, brought by the caller; nothing here needs TensorFlow.
Source: tensorflow/core/framework/graph.proto and node_def.proto (the form of a node's inputs).
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tdxd.core.op_types import DT_INVALID, functions_named_by, output_types
from tdxd.errors import DataError

__all__ = ["FREEZE", "FrozenGraph", "Shape", "TensorRef", "shape_text", "write_shape"]

Shape = tuple[int | None, ...] | None
"""Sizes, None for one that is not fixed; None as a whole if even their number is not known."""

_PLACEHOLDERS = frozenset({"Placeholder", "PlaceholderV2"})
_SCALAR_MEANS_UNKNOWN_UNTIL = 21
"""Producers up to this version wrote an unknown shape as a scalar's.

Source: PlaceholderShape in tensorflow/core/ops/array_ops.cc.
"""
FREEZE = (
    "freeze it first: tf.compat.v1.graph_util.convert_variables_to_constants, or "
    "convert_variables_to_constants_v2"
)
_CUT = "name the tensor behind it with --input, so that the graph begins there"
# What a graph of constants cannot hold: operations, what they are, what to do.
_NOT_FROZEN = (
    (
        re.compile("(Auto)?(Reload)?Variable(V2)?|TemporaryVariable|VarHandleOp"),
        "a variable, so the graph is not frozen",
        FREEZE,
    ),
    (
        re.compile(".*HashTable.*"),
        "a lookup table, which nothing fills",
        "export the model with tf.saved_model.save instead, or " + _CUT,
    ),
    (
        re.compile(".*(Queue|Iterator|Reader|Dataset)(V2)?"),
        "a source of training data",
        _CUT,
    ),
)
_REF = re.compile(r"([A-Za-z0-9.][A-Za-z0-9_.\\/>-]*)(?::([0-9]{1,4}))?")
_SHOWN = 5


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class TensorRef:
    """One output of a node."""

    node: str
    index: int = 0

    @classmethod
    def parse(cls, text: str) -> TensorRef:
        """Parse `NODE` or `NODE:INDEX`.

        Raises: DataError.
        """
        if text.startswith("^"):
            hint = "name a node that gives a tensor"
            raise DataError(
                f"{text} is a control output: it carries no data", hint=hint
            )
        found = _REF.fullmatch(text)
        if found is None:
            hint = "write NODE or NODE:INDEX, as in softmax:0"
            raise DataError(f"{text!r} names no tensor", hint=hint)
        return cls(found[1], int(found[2] or 0))

    def __str__(self) -> str:
        return f"{self.node}:{self.index}"


class FrozenGraph:
    """A GraphDef and an index of it. `prune` changes the message, nothing else does.

    Raises: DataError if the message is no graph.
    """

    def __init__(self, message: Any, *, source: str) -> None:
        self.message = message
        self.source = source
        self._functions = {one.signature.name: one for one in message.library.function}
        self._nodes: dict[str, Any] = {}
        for node in message.node:
            if not node.name or not node.op or node.name in self._nodes:
                what = f"its node {node.name!r} has no operation or is there twice"
                raise DataError(f"{source} is no graph: {what}")
            self._nodes[node.name] = node
        if not self._nodes:
            raise DataError(f"{source} is no frozen graph: it holds no nodes")

    # --- what a tensor is -----------------------------------------------------

    def require(self, ref: TensorRef, role: str) -> None:
        """Check that a tensor named by the user exists.

        Raises: DataError with names that are near.
        """
        node = self._nodes.get(ref.node)
        if node is None:
            near = difflib.get_close_matches(
                ref.node, self._nodes, n=_SHOWN, cutoff=0.5
            )
            found = (
                near
                or sorted(
                    {str(one) for one in (*self.placeholders(), *self.results())}
                )[:_SHOWN]
            )
            hint = "there is: " + ", ".join(found)
            raise DataError(f"{role} {ref}: {self.source} has no such node", hint=hint)
        types = output_types(node, self._functions)
        if types is not None and ref.index >= len(types):
            has = f"gives {len(types)} tensors" if types else "gives no tensor"
            hint = "name a node that gives one"
            if types:
                hint = f"the last one is {ref.node}:{len(types) - 1}"
            raise DataError(f"{role} {ref}: {ref.node} ({node.op}) {has}", hint=hint)

    def dtype(self, ref: TensorRef) -> int:
        """Return a tensor's DataType number; DT_INVALID if it is not known here."""
        types = output_types(self._nodes[ref.node], self._functions)
        if types is None or ref.index >= len(types):
            return DT_INVALID
        return types[ref.index]

    def shape(self, ref: TensorRef) -> Shape:
        """Return a tensor's shape as far as the node's own attributes say it."""
        node = self._nodes[ref.node]
        if "_output_shapes" in node.attr:
            shapes = node.attr["_output_shapes"].list.shape
            if ref.index < len(shapes):
                return _shape(shapes[ref.index])
        if not node.op.startswith("Placeholder") or "shape" not in node.attr:
            return None
        shape = _shape(node.attr["shape"].shape)
        producer: int = self.message.versions.producer
        return None if not shape and producer <= _SCALAR_MEANS_UNKNOWN_UNTIL else shape

    def operation(self, ref: TensorRef) -> str:
        """Return the name of the operation that gives a tensor."""
        op: str = self._nodes[ref.node].op
        return op

    # --- what goes in and comes out -------------------------------------------

    def placeholders(self) -> list[TensorRef]:
        """Return every placeholder, in the graph's order."""
        return [TensorRef(n.name) for n in self.message.node if n.op in _PLACEHOLDERS]

    def results(self) -> list[TensorRef]:
        """Return what depends on a placeholder and no tensor depends on, in the graph's order."""
        takers: dict[str, set[str]] = collections.defaultdict(set)
        waiters: dict[str, set[str]] = collections.defaultdict(set)
        for node in self.message.node:
            for one in _data_inputs(node):
                takers[one.node].add(node.name)
            for name in _all_inputs(node):
                waiters[name].add(node.name)
        fed = {one.node for one in self.placeholders()}
        depending = _reached(fed, takers) - fed
        return [
            TensorRef(node.name, index)
            for node in self.message.node
            if node.name in depending and not self._used(node.name, waiters)
            for index in range(self._count(node))
        ]

    def _used(self, name: str, waiters: Mapping[str, set[str]]) -> bool:
        """Whether a tensor depends on a node, be it by an assertion or a group of nodes only."""
        waiting, seen = [name], {name}
        while waiting:
            for user in waiters.get(waiting.pop(), ()):
                if self._count(self._nodes[user]):
                    return True
                if user not in seen:
                    seen.add(user)
                    waiting.append(user)
        return False

    def _count(self, node: Any) -> int:
        types = output_types(node, self._functions)
        return 1 if types is None else len(types)

    def feeds_of(
        self, outputs: Iterable[TensorRef], inputs: Iterable[TensorRef] = ()
    ) -> list[TensorRef]:
        """Return the placeholders that outputs depend on, if the graph begins at `inputs`.

        Raises: DataError if a node that is needed is missing.
        """
        needed = self._needed(outputs, inputs)
        return [one for one in self.placeholders() if one.node in needed]

    def _needed(
        self, outputs: Iterable[TensorRef], inputs: Iterable[TensorRef]
    ) -> set[str]:
        """Return the nodes that outputs depend on, the nodes of `inputs` not looked behind."""
        begin = {one.node for one in inputs}
        waiting = [one.node for one in outputs]
        found = set(waiting)
        while waiting:
            name = waiting.pop()
            if name in begin:
                continue
            for other in _all_inputs(self._nodes[name]):
                if other not in self._nodes:
                    raise DataError(
                        f"{self.source}: node {name} takes {other}, which is missing",
                        hint="the graph was cut: begin behind the cut with --input, or "
                        "freeze it again",
                    )
                if other not in found:
                    found.add(other)
                    waiting.append(other)
        return found

    # --- what stays -----------------------------------------------------------

    def prune(
        self, signatures: Iterable[tuple[dict[TensorRef, Shape], list[TensorRef]]]
    ) -> None:
        """Drop all that no signature (inputs, outputs) needs; inputs become placeholders.

        An input that another signature computes stays as it is, and can be fed all the same.
        Where a node is to run is dropped, too: the server decides that.

        Raises: DataError if what stays is not a graph of constants.
        """
        kept: set[str] = set()
        computed: set[str] = set()
        given: dict[TensorRef, Shape] = {}
        for inputs, outputs in signatures:
            needed = self._needed(outputs, inputs)
            computed |= needed - {one.node for one in inputs}
            kept |= needed | {one.node for one in inputs}
            given |= inputs
        for ref, shape in given.items():
            if ref.node not in computed:
                self._begin_at(ref, shape, kept)
        functions = self._called(kept)
        for node in self._running(kept, functions):
            node.device = ""
            _check_frozen(node, self.source)
        _keep(self.message.node, lambda node: node.name in kept)
        library = self.message.library
        _keep(library.function, lambda one: one.signature.name in functions)
        _keep(library.gradient, lambda one: one.function_name in functions)
        self._nodes = {name: self._nodes[name] for name in kept}

    def _begin_at(self, ref: TensorRef, shape: Shape, kept: set[str]) -> None:
        """Turn the node of an input into a placeholder, unless it is one."""
        node = self._nodes[ref.node]
        if node.op in _PLACEHOLDERS:
            return
        others = {
            one
            for name in kept
            for one in _data_inputs(self._nodes[name])
            if one.node == ref.node and one != ref
        }
        if others or ref.index:
            raise DataError(
                f"input {ref}: {ref.node} gives several tensors, which cannot be cut apart",
                hint="name the nodes that take them",
            )
        dtype = self.dtype(ref)
        if dtype == DT_INVALID:
            raise DataError(
                f"input {ref}: the element type of {ref.node} ({node.op}) is not known",
                hint="name a node behind it, such as an Identity",
            )
        del node.input[:]
        node.attr.clear()
        node.op = "Placeholder"
        node.attr["dtype"].type = dtype
        write_shape(node.attr["shape"].shape, shape)

    def _called(self, kept: Iterable[str]) -> set[str]:
        """Return the library's functions that nodes call, directly or not."""
        waiting = [self._nodes[name] for name in kept]
        found: set[str] = set()
        while waiting:
            for name in functions_named_by(waiting.pop()):
                if name in self._functions and name not in found:
                    found.add(name)
                    waiting += self._functions[name].node_def
        return found

    def _running(self, kept: Iterable[str], functions: Iterable[str]) -> Iterator[Any]:
        yield from (self._nodes[name] for name in sorted(kept))
        for name in functions:
            yield from self._functions[name].node_def


def _check_frozen(node: Any, source: str) -> None:
    for operations, what, hint in _NOT_FROZEN:
        if operations.fullmatch(node.op):
            raise DataError(
                f"{source}: node {node.name} ({node.op}) is {what}", hint=hint
            )


def _data_inputs(node: Any) -> Iterator[TensorRef]:
    """Yield the tensors that a node takes."""
    for text in node.input:
        if not text.startswith("^"):
            name, colon, index = text.rpartition(":")
            numbered = colon and index.isdigit()
            yield TensorRef(name, int(index)) if numbered else TensorRef(text)


def _all_inputs(node: Any) -> Iterator[str]:
    """Yield the nodes that a node waits for, whether it takes a tensor of theirs or not."""
    for text in node.input:
        yield text[1:] if text.startswith("^") else text.partition(":")[0]


def _reached(begin: Iterable[str], edges: Mapping[str, set[str]]) -> set[str]:
    """Return what can be reached along edges, the beginning included."""
    found = set(begin)
    waiting = list(found)
    while waiting:
        more = edges.get(waiting.pop(), set()) - found
        found |= more
        waiting += more
    return found


def _keep(messages: Any, wanted: Callable[[Any], bool]) -> None:
    """Remove from a repeated field what is not wanted, without copying the rest."""
    for index in range(len(messages) - 1, -1, -1):
        if not wanted(messages[index]):
            del messages[index]


def _shape(message: Any) -> Shape:
    if message.unknown_rank:
        return None
    return tuple(None if dim.size < 0 else dim.size for dim in message.dim)


def write_shape(message: Any, shape: Shape) -> None:
    """Fill a TensorShapeProto."""
    message.SetInParent()
    if shape is None:
        message.unknown_rank = True
        return
    for size in shape:
        message.dim.add().size = -1 if size is None else size


def shape_text(shape: Shape) -> str:
    """Return a shape as people write it: `[?,224,224,3]`, or `[…]` if the rank is not known."""
    if shape is None:
        return "[…]"
    return "[" + ",".join("?" if one is None else str(one) for one in shape) + "]"
