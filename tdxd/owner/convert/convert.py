"""Makes a SavedModel of a frozen graph.

A SavedModel without variables is one protobuf message around the graph, so making it needs no
TensorFlow, and no weight is touched: the answers are the graph's own, bit for bit. TensorFlow
then loads what was made, before it gets its name.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from google.protobuf.message import DecodeError, EncodeError

from tdxd.core.frozen_graph import FrozenGraph
from tdxd.core.signature import Signature, SignatureRequest, resolve, write_signature
from tdxd.errors import DataError, HostError
from tdxd.host import tf_messages
from tdxd.owner.convert.samples import WARMUP_FILE, sample_of, warmup_records
from tdxd.owner.convert.staging import staged_directory, write_file
from tdxd.owner.convert.tensorflow_check import (
    TensorFlowCheck,
    shortened,
    tensorflow_check,
)

__all__ = ["ConvertRequest", "Converted", "Run", "convert", "describe", "judge"]

_MAX_BYTES = 2**31 - 1
"""Protobuf's limit of a message, which a SavedModel's graph cannot pass either."""
_KERAS = "a Keras model: freeze it, or export it with model.export(), which needs no conversion"
# How files that are often taken for frozen graphs begin, and what to do with them.
_KNOWN_FILES = (
    (0, b"\x89HDF\r\n\x1a\n", _KERAS),
    (0, b"PK\x03\x04", _KERAS),
    (4, b"TFL3", "a TensorFlow Lite model: convert the graph that it was made of"),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ConvertRequest:
    """What to convert, and where to: DIRECTORY/VERSION.

    `samples` are files with inputs, by key; `warmup` adds a record of what the check could run.
    """

    graph: Path
    directory: Path
    version: int = 1
    signatures: tuple[SignatureRequest, ...] = (SignatureRequest(),)
    samples: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    warmup: bool = True


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How a signature's sample ran: the loaders' greatest difference, or why it did not run."""

    difference: float | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What was made. Without a check `tensorflow` is empty and `runs`, too."""

    path: Path
    size_bytes: int
    sha256: str
    signatures: tuple[Signature, ...]
    tensorflow: str
    runs: Mapping[str, Run]
    warmup_requests: int


def describe(
    graph: Path, requests: Sequence[SignatureRequest]
) -> tuple[Signature, ...]:
    """Return the signatures that a frozen graph would get.

    Raises: DataError, HostError.
    """
    _, found = _read_graph(graph)
    return tuple(resolve(found, one) for one in requests)


def convert(request: ConvertRequest, command: tuple[str, ...] | None) -> Converted:
    """Convert a frozen graph; `command` starts a TensorFlow to check it with, None for no check.

    Raises: DataError for a graph that cannot be converted or loaded, UnavailableError if
    TensorFlow does not start, HostError; nothing is left under the final name.
    """
    target = request.directory.absolute() / str(request.version)
    hint = "remove it, or choose another number with --model-version"
    with staged_directory(target, hint=hint) as staged:
        model, graph = _read_graph(request.graph)
        signatures = tuple(resolve(graph, one) for one in request.signatures)
        _check_keys(signatures, request.samples)
        graph.prune([one.refs() for one in signatures])
        if command is None:
            samples = _samples(signatures, request.samples)
            data = _write_model(staged, model, signatures)
            made = _Model(signatures, data, samples)
        else:
            with tensorflow_check(command) as tensorflow:
                made = _checked(tensorflow, staged, model, signatures, request.samples)
        count = _write_warmup(request, staged, made)
    return Converted(
        path=request.directory / str(request.version),
        size_bytes=len(made.data),
        sha256=hashlib.sha256(made.data).hexdigest(),
        signatures=made.signatures,
        tensorflow=made.tensorflow,
        runs=made.runs,
        warmup_requests=count,
    )


_Samples = Mapping[str, dict[str, Any] | str]
"""Inputs to try a signature with, by its name and by key; or why there are none."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Model:
    """A model that was written, and what TensorFlow said to it."""

    signatures: tuple[Signature, ...]
    data: bytes
    samples: _Samples
    tensorflow: str = ""
    runs: Mapping[str, Run] = dataclasses.field(default_factory=dict)


def _checked(
    tensorflow: TensorFlowCheck,
    staged: Path,
    model: Any,
    signatures: tuple[Signature, ...],
    files: Mapping[str, Path],
) -> _Model:
    """Write the model with the shapes that TensorFlow infers; load and run it."""
    # The first file is for its graph only; a signature needs the types that are asked for here.
    _write_model(staged, model, ())
    tensors = sorted(
        {str(one.ref) for each in signatures for one in (*each.inputs, *each.outputs)}
    )
    found = {
        name: (one["dtype"], None if one["shape"] is None else tuple(one["shape"]))
        for name, one in tensorflow.describe(staged, tensors).items()
    }
    signatures = tuple(one.refined(found) for one in signatures)
    data = _write_model(staged, model, signatures)
    samples = _samples(signatures, files)
    runs = _run(tensorflow, staged, samples, given=bool(files))
    return _Model(signatures, data, samples, tensorflow.version, runs)


def _samples(signatures: Sequence[Signature], files: Mapping[str, Path]) -> _Samples:
    return {one.name: sample_of(one, files) for one in signatures}


def _run(
    tensorflow: TensorFlowCheck,
    staged: Path,
    samples: _Samples,
    *,
    given: bool,
) -> dict[str, Run]:
    encoded = {
        name: _encoded(sample) if isinstance(sample, dict) else None
        for name, sample in samples.items()
    }
    runs = {}
    for name, answer in tensorflow.check(staged, encoded).items():
        sample = samples[name]
        if isinstance(sample, str):
            runs[name] = Run(reason=sample)
        else:
            runs[name] = judge(name, answer, given=given)
    return runs


def _encoded(sample: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: base64.b64encode(message.SerializeToString()).decode()
        for key, message in sample.items()
    }


def judge(name: str, answer: Mapping[str, Any], *, given: bool) -> Run:
    """Judge how both loaders ran a sample, which the user gave, or we made up.

    Raises: DataError if one could and the other not, if their answers differ, and if both refuse
    what the user gave.
    """
    if "difference" in answer:
        return Run(difference=answer["difference"])
    if "unequal" in answer:
        raise DataError(
            f"signature {name}: the eager and the Session loader answer differently: "
            f"{answer['unequal']}",
            hint="a graph that draws random numbers does; if that is meant: --no-check",
        )
    refusals = {"eager": answer["eager"], "Session": answer["session"]}
    if not all(refusals.values()):
        which = next(loader for loader, text in refusals.items() if text)
        text = shortened(refusals[which])
        raise DataError(
            f"signature {name}: only the {which} loader cannot run it: {text}"
        )
    reason = shortened(answer["session"])
    if given:
        raise DataError(f"signature {name} refuses its sample: {reason}")
    return Run(reason=reason)


# --- reading ------------------------------------------------------------------


def _read_graph(path: Path) -> tuple[Any, FrozenGraph]:
    """Return a SavedModel message around the graph in a file, and the graph's index.

    The graph is parsed where it stays: weights are hundreds of megabytes.
    """
    model = tf_messages.saved_model().SavedModel()
    graph = model.meta_graphs.add().graph_def
    data = _read(path)
    try:
        if path.suffix == ".pbtxt":
            text_format.Parse(data.decode(), graph)
        else:
            graph.ParseFromString(data)
    except (DecodeError, UnicodeDecodeError, text_format.ParseError) as exc:
        raise _no_graph(path, data) from exc
    if not graph.node or not all(one.op for one in graph.node):
        raise _no_graph(path, data)
    return model, FrozenGraph(graph, source=str(path))


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise DataError(
                f"{path}: {size} bytes, more than the 2 GiB of a protobuf message",
                hint="such a model needs variables: tf.saved_model.save",
            )
        return path.read_bytes()
    except OSError as exc:
        raise HostError.of("read", str(path), exc) from exc


def _no_graph(path: Path, data: bytes) -> DataError:
    """Say what else a file may be."""
    for offset, magic, hint in _KNOWN_FILES:
        if data[offset : offset + len(magic)] == magic:
            return DataError(f"{path} is no frozen graph", hint=f"it is {hint}")
    hint = "a binary GraphDef is wanted, or its text in a .pbtxt file"
    other = tf_messages.saved_model().SavedModel()
    try:
        other.ParseFromString(data)
    except DecodeError:
        return DataError(f"{path} is no frozen graph", hint=hint)
    if any(one.meta_info_def.tags for one in other.meta_graphs):
        hint = "it is a SavedModel already: it can be sealed and served as it is"
    return DataError(f"{path} is no frozen graph", hint=hint)


def _check_keys(signatures: Sequence[Signature], samples: Mapping[str, Path]) -> None:
    keys = {one.key for each in signatures for one in each.inputs}
    for key in samples:
        if key not in keys:
            hint = f"the inputs are {', '.join(sorted(keys))}"
            raise DataError(f"sample {key}: no input has this key", hint=hint)


# --- writing ------------------------------------------------------------------


def _write_model(staged: Path, model: Any, signatures: Sequence[Signature]) -> bytes:
    """Write saved_model.pb; return its content."""
    model.saved_model_schema_version = 1
    meta = model.meta_graphs[0]
    meta.meta_info_def.tags[:] = ["serve"]
    meta.signature_def.clear()
    for one in signatures:
        write_signature(meta.signature_def[one.name], one)
    try:
        data: bytes = model.SerializeToString(deterministic=True)
    except EncodeError as exc:
        raise DataError(f"the model does not fit a protobuf message: {exc}") from exc
    write_file(staged / "saved_model.pb", data)
    return data


def _write_warmup(
    request: ConvertRequest,
    staged: Path,
    made: _Model,
) -> int:
    """Write the warm-up file; return the number of requests in it.

    A server refuses a model whose warm-up fails: so only what ran, or what the user gave, is in it.
    """
    chosen = {
        name: sample
        for name, sample in made.samples.items()
        if isinstance(sample, dict)
        and (made.runs[name].difference is not None if made.runs else request.samples)
    }
    if not request.warmup or not chosen:
        return 0
    name = request.directory.absolute().name
    write_file(staged / WARMUP_FILE, warmup_records(name, chosen))
    return len(chosen)
