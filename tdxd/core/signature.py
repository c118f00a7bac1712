"""Signatures of a model: which tensors of a graph go in and come out under which names. Pure."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from tdxd.core.frozen_graph import FREEZE, FrozenGraph, Shape, TensorRef, write_shape
from tdxd.core.op_types import DT_INVALID
from tdxd.errors import DataError, UsageError

__all__ = [
    "DEFAULT_SIGNATURE",
    "Endpoint",
    "Signature",
    "SignatureRequest",
    "TensorRequest",
    "resolve",
    "write_signature",
]

DEFAULT_SIGNATURE = "serving_default"
_PREDICT_METHOD = "tensorflow/serving/predict"
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
"""The loaders pass tensors as keyword arguments of Python functions."""
_NOT_SENDABLE = {20: "a resource handle", 21: "a variant"}
_REF_TYPES_FROM = 100
"""Types from here on are references to variables. Source: types.proto."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorRequest:
    """A tensor that the user named, with the key and the shape that they chose, if they did."""

    ref: TensorRef
    key: str | None = None
    shape: Shape = None

    @classmethod
    def parse(cls, text: str) -> TensorRequest:
        """Parse `KEY=NODE:INDEX[SHAPE]`, of which only NODE is needed.

        Raises: DataError, UsageError for a bad key or shape.
        """
        whole, text = text, text.removesuffix("]")
        shape: Shape = None
        if text != whole:
            text, _, sizes = text.partition("[")
            shape = _parse_shape(sizes, whole)
        key, equals, name = text.rpartition("=")
        if equals and not _KEY.fullmatch(key):
            raise UsageError(
                f"key {key!r} is no name",
                hint="letters, digits and _, not a digit first: KEY=NODE:0",
            )
        return cls(ref=TensorRef.parse(name), key=key if equals else None, shape=shape)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SignatureRequest:
    """What the user wants of a signature; without inputs or outputs, those found are taken."""

    name: str = DEFAULT_SIGNATURE
    inputs: tuple[TensorRequest, ...] = ()
    outputs: tuple[TensorRequest, ...] = ()

    def with_input(self, text: str) -> SignatureRequest:
        """Return it with one more input.

        Raises: DataError, UsageError.
        """
        more = (*self.inputs, TensorRequest.parse(text))
        return dataclasses.replace(self, inputs=more)

    def with_output(self, text: str) -> SignatureRequest:
        """Return it with one more output.

        Raises: DataError, UsageError.
        """
        one = TensorRequest.parse(text)
        if one.shape is not None:
            raise UsageError(f"{text}: the shape of an output is the graph's own")
        return dataclasses.replace(self, outputs=(*self.outputs, one))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One input or output: its key, tensor, DataType number (0: not known) and shape."""

    key: str
    ref: TensorRef
    dtype: int
    shape: Shape


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """A signature of the model that is made."""

    name: str
    inputs: tuple[Endpoint, ...]
    outputs: tuple[Endpoint, ...]

    def refs(self) -> tuple[dict[TensorRef, Shape], list[TensorRef]]:
        """Return the tensors of the inputs, with their shapes, and those of the outputs."""
        inputs = {one.ref: one.shape for one in self.inputs}
        return inputs, [one.ref for one in self.outputs]

    def refined(self, known: Mapping[str, tuple[int, Shape]]) -> Signature:
        """Return it with what is known better of its tensors: types and shapes by name."""
        return Signature(
            name=self.name,
            inputs=tuple(_refined(one, known) for one in self.inputs),
            outputs=tuple(_refined(one, known) for one in self.outputs),
        )


def _refined(one: Endpoint, known: Mapping[str, tuple[int, Shape]]) -> Endpoint:
    dtype, shape = known[str(one.ref)]
    if one.shape is not None:
        shape = one.shape
    return dataclasses.replace(one, dtype=dtype, shape=shape)


def _parse_shape(text: str, whole: str) -> tuple[int | None, ...]:
    sizes: list[int | None] = []
    for one in text.split(",") if text else ():
        if one != "?" and not (one.isascii() and one.isdigit() and len(one) < 10):
            hint = "sizes, or ? for one that is not fixed: image:0[?,224,224,3]"
            raise UsageError(f"{whole}: {one!r} is no size", hint=hint)
        sizes.append(None if one == "?" else int(one))
    return tuple(sizes)


def resolve(graph: FrozenGraph, request: SignatureRequest) -> Signature:
    """Find the tensors of a signature in a graph.

    Raises: DataError for a tensor that is not there or that no request can carry, and if the
    graph shows no input or no output.
    """
    for role, asked in (("input", request.inputs), ("output", request.outputs)):
        for one in asked:
            graph.require(one.ref, role)
    outputs = request.outputs or _found(graph.results())
    if not outputs:
        raise DataError(
            f"{graph.source}: nothing in the graph depends on a placeholder",
            hint="name its inputs and outputs with --input and --output",
        )
    named = [one.ref for one in request.inputs]
    left = graph.feeds_of([one.ref for one in outputs], named)
    if not request.inputs and not left:
        raise DataError(
            f"{graph.source}: no placeholder goes into {', '.join(_names(outputs))}",
            hint="name the input with --input",
        )
    unfed = [str(one) for one in left if one not in named]
    if request.inputs and unfed:
        raise DataError(
            f"{graph.source}: the outputs depend on {', '.join(unfed)}, too",
            hint="name every input, or none",
        )
    inputs = request.inputs or _found(left)
    return Signature(
        name=request.name,
        inputs=_endpoints(graph, inputs, "input"),
        outputs=_endpoints(graph, outputs, "output"),
    )


def _found(refs: Iterable[TensorRef]) -> tuple[TensorRequest, ...]:
    return tuple(TensorRequest(ref=one) for one in refs)


def _names(requests: Iterable[TensorRequest]) -> list[str]:
    return [str(one.ref) for one in requests]


def _endpoints(
    graph: FrozenGraph,
    requests: Sequence[TensorRequest],
    role: Literal["input", "output"],
) -> tuple[Endpoint, ...]:
    made: dict[str, Endpoint] = {}
    for one in requests:
        key = one.key or _free_key(one.ref, made)
        if key in made:
            raise UsageError(f"{role} {key} is named twice", hint="choose another KEY=")
        dtype = graph.dtype(one.ref)
        what = _NOT_SENDABLE.get(dtype)
        if what or dtype >= _REF_TYPES_FROM:
            raise DataError(
                f"{role} {one.ref} ({graph.operation(one.ref)}) is "
                f"{what or 'a reference to a variable'}, which no request can carry",
                hint=f"a graph with variables: {FREEZE}; else name another {role}",
            )
        shape = graph.shape(one.ref) if one.shape is None else one.shape
        made[key] = Endpoint(key=key, ref=one.ref, dtype=dtype, shape=shape)
    return tuple(made.values())


def _free_key(ref: TensorRef, taken: Iterable[str]) -> str:
    """Make a key of a node's name: its last part, the whole if that is taken."""
    end = f"_{ref.index}" if ref.index else ""
    for text in (ref.node.rpartition("/")[2], ref.node):
        key = re.sub(r"[^A-Za-z0-9_]", "_", text) + end
        key = key if _KEY.fullmatch(key) else f"_{key}"
        if key not in taken:
            return key
    raise UsageError(f"there is already a key {key}", hint=f"choose another: KEY={ref}")


def write_signature(message: Any, signature: Signature) -> None:
    """Fill a SignatureDef.

    Raises: DataError if an element type is not known.
    """
    message.method_name = _PREDICT_METHOD
    for field, endpoints in (
        (message.inputs, signature.inputs),
        (message.outputs, signature.outputs),
    ):
        for one in endpoints:
            if one.dtype == DT_INVALID:
                raise DataError(
                    f"the element type of {one.ref} is not known without TensorFlow",
                    hint="leave out --no-check, or name an Identity behind it",
                )
            field[one.key].name = str(one.ref)
            field[one.key].dtype = one.dtype
            write_shape(field[one.key].tensor_shape, one.shape)
