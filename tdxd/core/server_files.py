"""What a model server reads of us: its models, batching and monitoring, and its flags.

All in protobuf's text format. Source: tensorflow_serving/config/model_server_config.proto,
monitoring_config.proto, servables/tensorflow/session_bundle_config.proto.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

from tdxd.core.server_flags import ServerVersion
from tdxd.core.serving_config import BatchingConfig, ServedModelConfig, ServingConfig

__all__ = ["ServerPaths", "batching_text", "flags", "model_text", "monitoring_text"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerPaths:
    """Where a model server listens, and where its files are; `None`: not used."""

    socket: str
    models: str
    rest_port: int | None = None
    batching: str | None = None
    monitoring: str | None = None


def model_text(config: ServingConfig, base_paths: Mapping[str, str]) -> str:
    """Return a ModelServerConfig for models, given with their directories."""
    entries = "".join(
        f"  config {{ name: {json.dumps(name)} base_path: {json.dumps(path)} "
        f'model_platform: "tensorflow"{_versions(config.versions_of(name))} }}\n'
        for name, path in sorted(base_paths.items())
    )
    return "model_config_list {\n" + entries + "}\n"


def _versions(wanted: ServedModelConfig) -> str:
    policy = {
        "latest": f"latest {{ num_versions: {wanted.latest} }}",
        "all": "all { }",
        "specific": "specific { "
        + " ".join(f"versions: {number}" for number in wanted.versions)
        + " }",
    }[wanted.policy]
    labels = "".join(
        f" version_labels {{ key: {json.dumps(label)} value: {number} }}"
        for label, number in sorted(wanted.labels.items())
    )
    return f" model_version_policy {{ {policy} }}{labels}"


def batching_text(batching: BatchingConfig) -> str:
    """Return BatchingParameters; what is not configured is left out."""
    timeout_us = None if batching.timeout_s is None else round(batching.timeout_s * 1e6)
    numbers = {
        "max_batch_size": batching.max_batch_size,
        "batch_timeout_micros": timeout_us,
        "max_enqueued_batches": batching.max_enqueued_batches,
        "num_batch_threads": batching.threads,
    }
    lines = [
        f"{name} {{ value: {number} }}\n"
        for name, number in numbers.items()
        if number is not None
    ]
    lines += [f"allowed_batch_sizes: {size}\n" for size in batching.allowed_batch_sizes]
    return "".join(lines)


def monitoring_text(path: str) -> str:
    """Return a MonitoringConfig that shows metrics at a path of the REST interface."""
    return f"prometheus_config {{ enable: true path: {json.dumps(path)} }}\n"


def flags(
    config: ServingConfig, version: ServerVersion, paths: ServerPaths
) -> tuple[str, ...]:
    """Return the flags for a server of this version.

    No TCP port for gRPC; a failing model is tried twice, not for five minutes; one load thread,
    since with none a failing model stalls all others inside the server's own loop. Labels are for
    versions that are not loaded yet when the server starts.
    """
    timeout_ms = max(1, round(config.request_timeout_s * 1000))
    channel = (
        f"grpc.so_reuseport=0,grpc.max_receive_message_length={_message_limit(config)}"
    )
    made: dict[str, object] = {
        "port": 0,
        "rest_api_port": paths.rest_port or 0,
        "grpc_socket_path": paths.socket,
        "grpc_channel_arguments": channel,
        "model_config_file": paths.models,
        "max_num_load_retries": 1,
        "load_retry_interval_micros": 2_000_000,
        "num_load_threads": 1,
        "enable_profiler": "false",
        "enable_model_warmup": str(config.warmup).lower(),
        "tensorflow_intra_op_parallelism": config.intra_op_threads,
        "tensorflow_inter_op_parallelism": config.inter_op_threads,
        "grpc_max_threads": config.grpc_threads,
        "rest_api_num_threads": config.rest_threads,
        "rest_api_timeout_in_ms": timeout_ms if paths.rest_port else None,
        "enable_batching": "true" if paths.batching else None,
        "batching_parameters_file": paths.batching,
        "monitoring_config_file": paths.monitoring,
    }
    if any(one.labels for one in config.model):
        made["allow_version_labels_for_unavailable_models"] = "true"
    if version.kind == "drop-in":
        # Its health service tells the truth; the original's says SERVING whatever happens.
        made["enable_grpc_healthcheck_service"] = "true"
    own = (f"--{name}={value}" for name, value in made.items() if value is not None)
    return (*own, *config.extra_flags)


def _message_limit(config: ServingConfig) -> int:
    """Return the longest message; gRPC's own type for it has 31 bits."""
    return min(config.max_request_bytes, 2**31 - 1)
