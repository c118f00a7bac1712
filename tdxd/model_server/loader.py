"""Loads a SavedModel with TensorFlow. The one file of the server that needs it.

Source of the texts of failed loads: tensorflow/cc/saved_model/reader.cc.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import numpy as np
from google.protobuf import text_format
from google.protobuf.message import DecodeError

from tdxd.host import tf_messages
from tdxd.model_server.aborting_ops import open_rank
from tdxd.model_server.failure import RpcFailure
from tdxd.model_server.registry import Array, Runner, Servable

__all__ = ["load_saved_model", "start_tensorflow"]

# What the loader raises for files that are no proper SavedModel; it has no error class of its own.
_LOAD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    DecodeError,
)
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_STACK_END = "<stack traces unavailable>\n"


def start_tensorflow(*, intra_op_threads: int, inter_op_threads: int) -> None:
    """Import TensorFlow (some seconds) and set its thread pools; 0 means one per core."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(intra_op_threads)
    tf.config.threading.set_inter_op_parallelism_threads(inter_op_threads)


def load_saved_model(path: str, *, tags: frozenset[str]) -> Servable:
    """Load the SavedModel in a version directory.

    Raises: RpcFailure with TensorFlow's own words.
    """
    import tensorflow as tf

    try:
        signatures = _read_signatures(path, tags)
        loaded = tf.saved_model.load(path, tags=sorted(tags))
        functions = dict(loaded.signatures)
    except tf.errors.OpError as exc:
        raise RpcFailure(_code(exc), exc.message) from exc
    except _LOAD_ERRORS as exc:
        text = f"{type(exc).__name__}: {exc}"
        raise RpcFailure(grpc.StatusCode.INVALID_ARGUMENT, text) from exc
    for key in signatures.keys() & functions.keys():
        _refuse_abort(key, functions[key])
    runners = {
        key: _runner(loaded, functions[key], signature)
        for key, signature in signatures.items()
        if key in functions
    }
    return Servable(signatures=signatures, runners=runners)


def _refuse_abort(key: str, function: Callable[..., Any]) -> None:
    """Refuse a signature that lets a request end the process.

    Raises: RpcFailure.
    """
    try:
        found = open_rank(function)
    except (AttributeError, ImportError, TypeError):
        return  # another TensorFlow, whose graphs are not to be looked into like this
    if found:
        raise RpcFailure(
            grpc.StatusCode.INVALID_ARGUMENT,
            f'signature "{key}": {found} takes a tensor of any rank, and one of a wrong '
            "rank would end the server: export the model with a fixed number of dimensions",
        )


def _read_signatures(path: str, tags: frozenset[str]) -> Mapping[str, Any]:
    """Return the SignatureDef messages of the graph with these tags."""
    message = tf_messages.saved_model().SavedModel()
    binary, text = (os.path.join(path, f"saved_model.pb{end}") for end in ("", "txt"))
    if os.path.exists(binary):
        with open(binary, "rb") as file:
            message.ParseFromString(file.read())
    elif os.path.exists(text):
        with open(text, encoding="utf-8") as lines:
            text_format.Parse(lines.read(), message)
    else:
        raise RpcFailure(
            grpc.StatusCode.NOT_FOUND,
            "Could not find SavedModel .pb or .pbtxt at supplied export directory "
            f"path: {path}",
        )
    for graph in message.meta_graphs:
        if set(graph.meta_info_def.tags) == tags:
            # Copies: the rest of the message, with all weights of a frozen graph, can go.
            return {
                key: type(value).FromString(value.SerializeToString())
                for key, value in graph.signature_def.items()
            }
    raise RpcFailure(
        grpc.StatusCode.NOT_FOUND,
        "Could not find meta graph def matching supplied tags: "
        f"{{ {' '.join(sorted(tags))} }}. To inspect available tag-sets in the "
        "SavedModel, please use the SavedModel CLI: `saved_model_cli`",
    )


def _runner(loaded: Any, function: Callable[..., Any], signature: Any) -> Runner:
    import tensorflow as tf

    dtypes = {alias: info.dtype for alias, info in signature.inputs.items()}

    def run(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        assert loaded is not None  # a function alone does not keep its variables alive
        try:
            tensors = {
                alias: tf.constant(array, dtype=dtypes[alias])
                for alias, array in inputs.items()
            }
            outputs = function(**tensors)
        except tf.errors.OpError as exc:
            raise RpcFailure(_code(exc), _cause(exc.message)) from exc
        except (TypeError, ValueError) as exc:
            raise RpcFailure(grpc.StatusCode.INVALID_ARGUMENT, str(exc)) from exc
        return {alias: _array(tensor) for alias, tensor in outputs.items()}

    return run


def _array(tensor: Any) -> Array:
    value = tensor.numpy()
    # A scalar string comes as bytes, and as numpy's `S` it would lose trailing zero bytes.
    return np.array(value, dtype=object) if isinstance(value, bytes) else value


def _code(exc: Any) -> grpc.StatusCode:
    return _CODES.get(exc.error_code, grpc.StatusCode.UNKNOWN)


def _cause(text: str) -> str:
    """Drop the heading that TensorFlow's Python side puts before an operation's own words."""
    return text.rpartition(_STACK_END)[2]
