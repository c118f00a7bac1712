"""TensorFlow Serving's messages without TensorFlow.

The generated code of tensorflow-serving-api imports a few `tensorflow.core` message files, and
importing those would run TensorFlow's own start-up: 3 s and 546 MB. The message files need none
of it. So while they load, an empty package object that only knows TensorFlow's directory stands
in for TensorFlow; afterwards it is taken away again, and a later real `import tensorflow` works
and shares the message classes, since protobuf's pool holds one class for each message.

Each function loads one family of messages on first use and returns its module.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

from tdxd.errors import ServeError

__all__ = [
    "CLASSIFY_METHOD",
    "METADATA_METHOD",
    "MODEL_SERVICE",
    "PREDICTION_SERVICE",
    "PREDICT_METHOD",
    "REGRESS_METHOD",
    "RELOAD_METHOD",
    "STATUS_METHOD",
    "classification",
    "meta_graph",
    "model_management",
    "model_metadata",
    "model_server_config",
    "model_status",
    "predict",
    "prediction_log",
    "regression",
    "saved_model",
    "tensor",
    "type_name",
]

PREDICTION_SERVICE = "tensorflow.serving.PredictionService"
MODEL_SERVICE = "tensorflow.serving.ModelService"
# Full names of the calls, as `grpc.Channel.unary_unary` wants them.
# Source: tensorflow_serving/apis/prediction_service.proto and model_service.proto.
PREDICT_METHOD = f"/{PREDICTION_SERVICE}/Predict"
CLASSIFY_METHOD = f"/{PREDICTION_SERVICE}/Classify"
REGRESS_METHOD = f"/{PREDICTION_SERVICE}/Regress"
METADATA_METHOD = f"/{PREDICTION_SERVICE}/GetModelMetadata"
STATUS_METHOD = f"/{MODEL_SERVICE}/GetModelStatus"
RELOAD_METHOD = f"/{MODEL_SERVICE}/HandleReloadConfigRequest"

_HINT = "install tensorflow-serving-api, whose wheel brings tensorflow along"
_lock = threading.RLock()


@functools.cache
def model_status() -> Any:
    """Return the module with GetModelStatusRequest, GetModelStatusResponse, ModelVersionStatus.

    Raises: ServeError if the messages are not installed.
    """
    return _load("tensorflow_serving.apis.get_model_status_pb2")


@functools.cache
def predict() -> Any:
    """Return the module with PredictRequest and PredictResponse.

    Raises: ServeError if the messages are not installed.
    """
    return _load("tensorflow_serving.apis.predict_pb2")


@functools.cache
def classification() -> Any:
    """Return the module with ClassificationRequest and ClassificationResponse.

    Raises: ServeError if the messages are not installed.
    """
    return _load("tensorflow_serving.apis.classification_pb2")


@functools.cache
def regression() -> Any:
    """Return the module with RegressionRequest and RegressionResponse.

    Raises: ServeError if the messages are not installed.
    """
    return _load("tensorflow_serving.apis.regression_pb2")


@functools.cache
def model_management() -> Any:
    """Return the module with ReloadConfigRequest and ReloadConfigResponse.

    Raises: ServeError if the messages are not installed.
    """
    return _load("tensorflow_serving.apis.model_management_pb2")


@functools.cache
def model_metadata() -> Any:
    """Return the module with GetModelMetadataRequest and -Response and SignatureDefMap.

    Raises: ServeError if the messages are not installed.
    """
    return _load("tensorflow_serving.apis.get_model_metadata_pb2")


@functools.cache
def model_server_config() -> Any:
    """Return the module with ModelServerConfig, the content of `--model_config_file`.

    Raises: ServeError if the messages are not installed.
    """
    return _load("tensorflow_serving.config.model_server_config_pb2")


@functools.cache
def meta_graph() -> Any:
    """Return the module with SignatureDef and TensorInfo.

    Raises: ServeError if the messages are not installed.
    """
    return _load("tensorflow.core.protobuf.meta_graph_pb2")


@functools.cache
def saved_model() -> Any:
    """Return the module with SavedModel, the content of `saved_model.pb`.

    Raises: ServeError if the messages are not installed.
    """
    return _load("tensorflow.core.protobuf.saved_model_pb2")


@functools.cache
def tensor() -> Any:
    """Return the module with TensorProto.

    Raises: ServeError if the messages are not installed.
    """
    return _load("tensorflow.core.framework.tensor_pb2")


@functools.cache
def prediction_log() -> Any:
    """Return the module with PredictionLog, of which the warm-up file is made.

    Raises: ServeError if the messages are not installed.
    """
    return _load("tensorflow_serving.apis.prediction_log_pb2")


def type_name(number: int) -> str:
    """Return TensorFlow's name of an element type, such as `float`; `type 99` if unknown.

    `core.tensors` knows them, too, but needs numpy.
    """
    kinds = tensor().TensorProto.DESCRIPTOR.fields_by_name["dtype"].enum_type
    if number not in kinds.values_by_number:
        return f"type {number}"
    name: str = kinds.values_by_number[number].name
    return name.removeprefix("DT_").lower()


def _load(name: str) -> types.ModuleType:
    with _lock, _stand_in():
        try:
            return importlib.import_module(name)
        except ImportError as exc:
            message = f"no message module {name}: {exc}"
            raise ServeError(message, hint=_HINT) from exc


@contextlib.contextmanager
def _stand_in() -> Iterator[None]:
    """Let `import tensorflow.core…` find files, without running `tensorflow/__init__.py`."""
    if "tensorflow" in sys.modules:  # the real one: use it
        yield
        return
    sys.modules["tensorflow"] = _empty_package()
    try:
        yield
    finally:
        # Also its submodules: the real package must not find them half made.
        for name in list(sys.modules):
            if name == "tensorflow" or name.startswith("tensorflow."):
                del sys.modules[name]


def _empty_package() -> types.ModuleType:
    spec = importlib.machinery.PathFinder.find_spec("tensorflow")
    if spec is None or spec.submodule_search_locations is None:
        message = "the tensorflow package is not installed"
        raise ServeError(message, hint=_HINT)
    package = types.ModuleType("tensorflow")
    package.__spec__ = spec
    package.__path__ = list(spec.submodule_search_locations)
    return package
