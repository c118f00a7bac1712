"""What a model server is told: in the words of its own files and flags."""

from __future__ import annotations

import pytest

from tdxd.core.config import BatchingConfig, ServedModelConfig, ServingConfig
from tdxd.core.server_files import (
    ServerPaths,
    batching_text,
    flags,
    model_text,
    monitoring_text,
)
from tdxd.core.server_flags import ServerVersion
from tdxd.model_server.batching import parse_batching
from tdxd.model_server.flags import parse_flags
from tdxd.model_server.model_config import parse_model_config

CONFIG = ServingConfig(
    rest_listen="[::]:8501",
    monitoring=True,
    batching=BatchingConfig(
        max_batch_size=8, timeout_s=0.005, threads=2, allowed_batch_sizes=(4, 8)
    ),
    model=(
        ServedModelConfig(
            name="one", policy="specific", versions=(1, 3), labels={"stable": 1}
        ),
        ServedModelConfig(name="two", policy="all"),
        ServedModelConfig(name="three", latest=2),
    ),
    intra_op_threads=2,
    grpc_threads=8,
    warmup=False,
    max_request_bytes=1000,
    extra_flags=("--num_load_threads=2",),
)
PATHS = ServerPaths(
    socket="/s", models="/m", rest_port=8501, batching="/b", monitoring="/p"
)


def test_the_drop_in_reads_the_models_as_meant() -> None:
    text = model_text(CONFIG, {"one": "/v/one", "two": "/v/two", "three": '/v/"3"'})
    models = {model.name: model for model in parse_model_config(text, source="t")}
    assert models["one"].policy.versions == frozenset((1, 3))
    assert models["one"].labels == {"stable": 1}
    assert models["two"].policy.kind == "all"
    assert (models["three"].policy.kind, models["three"].policy.count) == ("latest", 2)


def test_the_drop_in_reads_the_batching_as_meant() -> None:
    assert CONFIG.batching is not None
    limits = parse_batching(batching_text(CONFIG.batching), source="t")
    assert (limits.max_rows, limits.timeout_s, limits.threads) == (8, 0.005, 2)
    assert limits.sizes == (4, 8)
    assert batching_text(BatchingConfig()) == ""


def test_the_drop_in_knows_every_flag() -> None:
    version = ServerVersion(kind="drop-in", number=(2, 19))
    read = parse_flags(flags(CONFIG, version, PATHS))
    assert (read.port, read.rest_port, read.grpc_socket_path) == (0, 8501, "/s")
    assert (read.batching, read.warmup_rounds, read.intra_op_threads) == (True, 0, 2)
    assert (read.grpc_max_threads, read.health_service, read.spread_labels) == (
        8,
        True,
        True,
    )
    assert ("grpc.max_receive_message_length", 1000) in read.channel_arguments


@pytest.mark.parametrize("config", [CONFIG, ServingConfig()])
def test_tensorflow_serving_gets_no_flag_that_2_11_lacks(config: ServingConfig) -> None:
    version = ServerVersion(kind="tensorflow", number=(2, 11))
    paths = PATHS if config.monitoring else ServerPaths(socket="/s", models="/m")
    names = [flag.partition("=")[0] for flag in flags(config, version, paths)]
    assert "--enable_grpc_healthcheck_service" not in names
    assert "--port" in names
    assert ("--rest_api_timeout_in_ms" in names) == config.monitoring


def test_metrics_are_shown_at_the_path_that_the_front_lets_through() -> None:
    text = monitoring_text("/monitoring/prometheus/metrics")
    assert 'path: "/monitoring/prometheus/metrics"' in text
