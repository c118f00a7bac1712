"""Messages that no installed package has, built from their fields in a pool of their own.

The health service's, and those of TensorFlow Serving's files of parameters, whose generated code
its wheel leaves out. Messages of this pool and generated ones never meet.

Source: grpc/health/v1/health.proto; tensorflow_serving/config/monitoring_config.proto;
tensorflow_serving/servables/tensorflow/session_bundle_config.proto.
"""

from __future__ import annotations

import functools
from typing import Any

from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    wrappers_pb2,
)

__all__ = [
    "BatchingParameters",
    "HealthCheckRequest",
    "HealthCheckResponse",
    "MonitoringConfig",
]

_Field = descriptor_pb2.FieldDescriptorProto
_WRAPPERS = "google/protobuf/wrappers.proto"
_KINDS = {
    "int64": _Field.TYPE_INT64,
    "bool": _Field.TYPE_BOOL,
    "string": _Field.TYPE_STRING,
}

# Message: field: (number, type, repeated); any other type than those above is a message or an enum.
_HEALTH = {
    "HealthCheckRequest": {"service": (1, "string", False)},
    "HealthCheckResponse": {"status": (1, "enum .grpc.health.v1.ServingStatus", False)},
}
_CONFIG = {
    "PrometheusConfig": {
        "enable": (1, "bool", False),
        "path": (2, "string", False),
    },
    "MonitoringConfig": {
        "prometheus_config": (1, ".tensorflow.serving.PrometheusConfig", False)
    },
    "BatchingParameters": {
        "max_batch_size": (1, ".google.protobuf.Int64Value", False),
        "batch_timeout_micros": (2, ".google.protobuf.Int64Value", False),
        "max_enqueued_batches": (3, ".google.protobuf.Int64Value", False),
        "num_batch_threads": (4, ".google.protobuf.Int64Value", False),
        "thread_pool_name": (5, ".google.protobuf.StringValue", False),
        "allowed_batch_sizes": (6, "int64", True),
        "pad_variable_length_inputs": (7, "bool", False),
    },
}
_Messages = dict[str, dict[str, tuple[int, str, bool]]]


@functools.cache
def _pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    health = _file("grpc.health.v1", _HEALTH)
    status = health.enum_type.add(name="ServingStatus")
    for number, name in enumerate(
        ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
    ):
        status.value.add(name=name, number=number)
    pool.AddSerializedFile(health.SerializeToString())
    config = _file("tensorflow.serving", _CONFIG)
    pool.AddSerializedFile(config.SerializeToString())
    return pool


def _file(package: str, messages: _Messages) -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name=f"{package}.proto", package=package, syntax="proto3"
    )
    file.dependency.append(_WRAPPERS)
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, repeated) in fields.items():
            label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
            made = message.field.add(name=field, number=number, label=label)
            if kind in _KINDS:
                made.type = _KINDS[kind]
            elif kind.startswith("enum "):
                made.type = _Field.TYPE_ENUM
                made.type_name = kind.removeprefix("enum ")
            else:
                made.type = _Field.TYPE_MESSAGE
                made.type_name = kind
    return file


def _class(name: str) -> Any:
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(name))


HealthCheckRequest: Any = _class("grpc.health.v1.HealthCheckRequest")
HealthCheckResponse: Any = _class("grpc.health.v1.HealthCheckResponse")
MonitoringConfig: Any = _class("tensorflow.serving.MonitoringConfig")
BatchingParameters: Any = _class("tensorflow.serving.BatchingParameters")
