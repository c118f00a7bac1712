"""Runs tdx-model-server and calls it over its unix socket."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc

from tdxd.core.tensors import read_tensor, write_content
from tdxd.host import tf_messages

__all__ = ["Caller", "RunningServer", "running_server", "server_command"]

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
    socket, output = directory / "s", directory / "log"
    own = ("--port=0", f"--grpc_socket_path={socket}")
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
        yield RunningServer(process, socket, output)
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

    def outputs(self, model: str, signature: str = "", **inputs: Any) -> dict[str, Any]:
        """Predict with arrays, as arrays."""
        request = predict_request(model, signature, **inputs)
        outputs = self.predict(request).outputs
        return {name: read_tensor(outputs[name]) for name in outputs}

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


def predict_request(model: str, signature: str = "", **inputs: Any) -> Any:
    """Make a PredictRequest from arrays."""
    request = tf_messages.predict().PredictRequest()
    request.model_spec.name = model
    request.model_spec.signature_name = signature
    for alias, array in inputs.items():
        write_content(request.inputs[alias], array)
    return request
