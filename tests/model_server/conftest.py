"""Models, and one running server with all services, for every conformance test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.model_server.running import Caller, running_server

CONFIG = """model_config_list {{
  config {{ name: "many" base_path: "{0}/many" model_platform: "tensorflow"
           model_version_policy {{ all {{}} }}
           version_labels {{ key: "stable" value: 1 }} }}
  config {{ name: "frozen" base_path: "{0}/frozen" model_platform: "tensorflow" }}
  config {{ name: "examples" base_path: "{0}/examples" model_platform: "tensorflow" }}
}}
"""


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    script = Path(__file__).with_name("models.py")
    done = subprocess.run(
        [sys.executable, script, directory],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="session")
def server(models, tmp_path_factory):
    directory = tmp_path_factory.mktemp("server")
    config, monitoring = directory / "models.config", directory / "monitoring.config"
    config.write_text(CONFIG.format(models))
    monitoring.write_text("prometheus_config { enable: true }")
    flags = (
        f"--model_config_file={config}",
        f"--rest_api_unix={directory / 'rest'}",
        f"--monitoring_config_file={monitoring}",
        "--enable_grpc_healthcheck_service",
    )
    with running_server(directory, *flags) as running:
        running.wait_for("Running gRPC ModelServer at unix:")
        yield running


@pytest.fixture(scope="session")
def rest(server):
    """Return the socket of the server's REST API."""
    return server.socket.with_name("rest")


@pytest.fixture(scope="session")
def caller(server):
    made = Caller(server.socket)
    made.ready()
    yield made
    made.close()
