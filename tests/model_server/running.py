"""Runs tdx-model-server and calls it over its unix socket."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client as http_client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import text_format

from tdxd.core.tensors import read_tensor, write_content
from tdxd.host import tf_messages
from tdxd.model_server.health import HEALTH_SERVICE
from tdxd.model_server.small_messages import HealthCheckRequest, HealthCheckResponse

__all__ = [
    "Caller",
    "RunningServer",
    "http",
    "predict_request",
    "refusal",
    "running_server",
    "server_command",
]

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0


def server_command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "tdxd.cli.tdx_model_server", *flags]


@dataclasses.dataclass(slots=True)
class RunningServer:
    """A server process, its socket, and the file with all it printed."""

    process: subprocess.Popen[bytes]
    socket: Path
    output: Path

    def log(self) -> str:
        return self.output.read_text()

    def wait_for(self, words: str) -> None:
        end_s = time.monotonic() + DEADLINE_S
        while words not in self.log():
            assert time.monotonic() < end_s, f"no {words!r} in:\n{self.log()}"
            time.sleep(0.05)

    def wait_until_ended(self) -> int:
        return self.process.wait(DEADLINE_S)


@contextlib.contextmanager
def running_server(
    directory: Path, *flags: str, program: Sequence[str] = ()
) -> Iterator[RunningServer]:
    """Start a server on a socket in `directory`; kill it at the end of the block.

    `program` is the command without flags; default: this source tree's.
    """
    path, output = directory / "s", directory / "log"
    own = ("--port=0", f"--grpc_socket_path={path}")
    command = [*(program or server_command()), *own, *flags]
    with output.open("wb") as sink:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=sink,
            stderr=sink,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"},
        )
    try:
        yield RunningServer(process, path, output)
    finally:
        process.kill()
        process.wait()


class Caller:
    """Calls a server's methods with plain values."""

    def __init__(self, socket: Path) -> None:
        # gRPC names a unix socket's server `localhost` only if told.
        options = [("grpc.default_authority", "localhost")]
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=options)

    def close(self) -> None:
        self._channel.close()

    def ready(self) -> None:
        grpc.channel_ready_future(self._channel).result(DEADLINE_S)

    def _call(self, method: str, request: Any, response_class: Any) -> Any:
        call: Any = self._channel.unary_unary(
            method,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response_class.FromString,
        )
        return call(request, timeout=DEADLINE_S)

    def predict(self, request: Any) -> Any:
        """Send a PredictRequest."""
        response_class = tf_messages.predict().PredictResponse
        return self._call(tf_messages.PREDICT_METHOD, request, response_class)

    def start(self, model: str, signature: str = "", **inputs: Any) -> Any:
        """Send a PredictRequest; return its future."""
        call: Any = self._channel.unary_unary(
            tf_messages.PREDICT_METHOD,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=tf_messages.predict().PredictResponse.FromString,
        )
        request = predict_request(model, signature, **inputs)
        return call.future(request, timeout=DEADLINE_S)

    def outputs(self, model: str, signature: str = "", **inputs: Any) -> dict[str, Any]:
        """Predict with arrays, as arrays."""
        request = predict_request(model, signature, **inputs)
        outputs = self.predict(request).outputs
        return {name: read_tensor(outputs[name]) for name in outputs}

    def classify(self, request: Any) -> Any:
        """Send a ClassificationRequest."""
        response_class = tf_messages.classification().ClassificationResponse
        return self._call(tf_messages.CLASSIFY_METHOD, request, response_class)

    def regress(self, request: Any) -> Any:
        """Send a RegressionRequest."""
        response_class = tf_messages.regression().RegressionResponse
        return self._call(tf_messages.REGRESS_METHOD, request, response_class)

    def reload(self, text: str) -> Any:
        """Ask for other models, with a ModelServerConfig in text form."""
        management = tf_messages.model_management()
        request = management.ReloadConfigRequest()
        text_format.Parse(text, request.config)
        response_class = management.ReloadConfigResponse
        return self._call(tf_messages.RELOAD_METHOD, request, response_class)

    def health(self, service: str = "") -> int:
        """Return a service's ServingStatus."""
        request = HealthCheckRequest(service=service)
        method = f"/{HEALTH_SERVICE}/Check"
        return int(self._call(method, request, HealthCheckResponse).status)

    def metadata(self, request: Any) -> Any:
        """Send a GetModelMetadataRequest."""
        response_class = tf_messages.model_metadata().GetModelMetadataResponse
        return self._call(tf_messages.METADATA_METHOD, request, response_class)

    def status(self, request: Any) -> Any:
        """Send a GetModelStatusRequest."""
        response_class = tf_messages.model_status().GetModelStatusResponse
        return self._call(tf_messages.STATUS_METHOD, request, response_class)

    def states(self, model: str) -> dict[int, tuple[int, int, str]]:
        """Return (state, error code, error text) of each version of a model."""
        request = tf_messages.model_status().GetModelStatusRequest()
        request.model_spec.name = model
        return {
            one.version: (one.state, one.status.error_code, one.status.error_message)
            for one in self.status(request).model_version_status
        }


def refusal(
    call: Callable[..., Any], *arguments: Any, **inputs: Any
) -> tuple[str, str]:
    """Return code and text of a call that is refused."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **inputs)
    error: Any = caught.value
    return error.code().name, error.details()


def predict_request(model: str, signature: str = "", **inputs: Any) -> Any:
    """Make a PredictRequest from arrays."""
    request = tf_messages.predict().PredictRequest()
    request.model_spec.name = model
    request.model_spec.signature_name = signature
    for alias, array in inputs.items():
        write_content(request.inputs[alias], array)
    return request


def http(
    address: Path | int, method: str, path: str, body: object = b""
) -> tuple[int, str, Any]:
    """Send one request to a unix socket or a port; return status, content type, and the body."""
    family = socket.AF_INET if isinstance(address, int) else socket.AF_UNIX
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http_client.HTTPConnection("localhost", timeout=DEADLINE_S)
    connection.sock = socket.socket(family)
    connection.sock.settimeout(DEADLINE_S)
    where = ("127.0.0.1", address) if isinstance(address, int) else str(address)
    with contextlib.closing(connection):
        connection.sock.connect(where)
        connection.request(method, path, sent)
        response = connection.getresponse()
        kind, data = response.headers["Content-Type"], response.read()
    text = data.decode()
    return response.status, kind, json.loads(text) if "json" in kind else text
