"""The measurements behind `serving.py`, each in a process of its own: `PART DIRECTORY`.

Each prints one JSON object as its last line.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

REQUESTS = 400
CLIENT_ROUNDS = 3
PAIRS = 60
CLIENTS = 8
BATCH_TURNS = 3
BATCH_TURN_S = 8.0
SHAPE = (1, 224, 224, 3)


def image() -> Any:
    return np.random.default_rng(1).random(SHAPE, np.float32)


# --- the client: in both parts the double answers in a process of its own -------


def client(directory: Path) -> dict[str, float]:
    """Measure tdx-infer's own closed loop, with an image and with a request of no bytes."""
    from tdxd.user.endpoint import read_ca
    from tdxd.user.infer import Model, encode_request

    image_request = encode_request(Model(name="double"), {"x": image()})
    with DoubleProcess(directory) as double:
        ca_pem = read_ca(str(double.ca))
        requests = {"cpu_us": image_request, "empty_cpu_us": b""}
        return {
            name: min(
                _closed_loop_cpu_us(double.address, ca_pem, request)
                for _ in range(CLIENT_ROUNDS)
            )
            for name, request in requests.items()
        }


def _closed_loop_cpu_us(address: str, ca_pem: bytes, request: bytes) -> float:
    from tdxd.user.bench import Load, run_bench
    from tdxd.user.endpoint import Endpoint

    report = run_bench(
        Endpoint(address=address, ca_pem=ca_pem),
        Load(clients=1, loops=REQUESTS, batch=1, warm_up=20),
        request,
        on_query=lambda _query: None,
        on_warm=lambda _elapsed_s: None,
    )
    assert not report.errors
    return report.client_cpu_s / REQUESTS * 1e6


def tf_client(directory: Path) -> dict[str, float]:
    """Measure a client that builds each request with TensorFlow and parses each answer."""
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    x = image()
    with DoubleProcess(directory) as double:
        credentials = grpc.ssl_channel_credentials(double.ca.read_bytes())
        channel = grpc.secure_channel(double.address, credentials)
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

        def call() -> None:
            request = predict_pb2.PredictRequest()
            request.model_spec.name = "double"
            request.inputs["x"].CopyFrom(tf.make_tensor_proto(x))
            stub.Predict(request, timeout=30)

        for _ in range(20):
            call()
        rounds_s = []
        for _ in range(CLIENT_ROUNDS):
            started_s = time.process_time()
            for _ in range(REQUESTS):
                call()
            rounds_s.append(time.process_time() - started_s)
        channel.close()
    return {"cpu_us": min(rounds_s) / REQUESTS * 1e6}


class DoubleProcess:
    """A server that answers every request at once with ten numbers, over TLS."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> Self:
        import subprocess

        command = [sys.executable, "-m", "tests.bench.serving_parts", "double"]
        self._process = subprocess.Popen(
            [*command, str(self._directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        self.ca = self._directory / "ca.pem"
        return self

    def __exit__(self, *_exc: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.wait()


def double(directory: Path) -> None:
    """Be that server until standard input ends."""
    from concurrent import futures

    from tdxd.core.tensors import write_values
    from tdxd.host import tf_messages
    from tests.certificates import self_signed

    pem, public = self_signed("localhost")
    (directory / "ca.pem").write_bytes(public)
    response = tf_messages.predict().PredictResponse()
    response.model_spec.name = "double"
    write_values(response.outputs["y"], np.zeros((1, 10), np.float32))
    answer = response.SerializeToString()
    handler: Any = grpc.unary_unary_rpc_method_handler(
        lambda _request, _context: answer
    )
    service = grpc.method_handlers_generic_handler(
        tf_messages.PREDICTION_SERVICE, {"Predict": handler}
    )
    server = grpc.server(futures.ThreadPoolExecutor(2), handlers=[service])
    credentials = grpc.ssl_server_credentials([(pem, public)])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    sys.stdout.write(f"localhost:{port}\n")
    sys.stdout.flush()
    sys.stdin.read()
    server.stop(None).wait()


# --- the drop-in --------------------------------------------------------------


def resnet(directory: Path) -> Path:
    """Write a ResNet50 with random weights; return its version's directory."""
    import keras
    import tensorflow as tf

    path = directory / "resnet" / "1"
    if path.exists():
        return path
    keras.utils.set_random_seed(1)
    model = keras.applications.ResNet50(weights=None)
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint(
        name="serving_default",
        fn=lambda input: {"predict": model(input, training=False)},  # noqa: A006
        input_signature=[tf.TensorSpec([None, *SHAPE[1:]], tf.float32, name="input")],
    )
    archive.write_out(path, verbose=False)
    return path


def make_resnet(directory: Path) -> dict[str, float]:
    """Make the model, for a process that must not import TensorFlow."""
    resnet(directory)
    return {}


def drop_in(directory: Path) -> dict[str, float]:
    """Take turns between the served model and the same SavedModel in this process."""
    import tensorflow as tf

    from tests.model_server.running import Caller, predict_request, running_server

    path = resnet(directory)
    loaded = tf.saved_model.load(str(path))
    function = loaded.signatures["serving_default"]
    x = image()

    def local_answer() -> Any:
        return function(input=tf.constant(x))["predict"].numpy()

    flags = [f"--model_base_path={path.parent}", "--model_name=resnet"]
    with running_server(directory, *flags) as server:
        server.wait_for("Running gRPC ModelServer")
        caller = Caller(server.socket)
        request = predict_request("resnet", input=x)
        served, local = [], []
        for turn in range(PAIRS + 5):
            one = _ms(lambda: caller.predict(request))
            other = _ms(local_answer)
            if turn >= 5:
                served.append(one)
                local.append(other)
        answer = caller.outputs("resnet", input=x)["predict"]
        caller.close()
    assert np.array_equal(answer, local_answer())
    return {
        "served_ms": statistics.median(served),
        "in_process_ms": statistics.median(local),
    }


def batching(directory: Path) -> dict[str, float]:
    """Take turns between one model served in batches, one by one, and as many at once as CPUs."""
    import contextlib

    from tests.model_server.running import running_server

    path = resnet(directory)
    parameters = directory / "batching"
    parameters.write_text(
        f"max_batch_size {{ value: {CLIENTS} }} num_batch_threads {{ value: 1 }}"
    )
    flags = [f"--model_base_path={path.parent}", "--model_name=resnet"]
    ways = {
        "single": [*flags, "--grpc_max_threads=1"],
        "default": flags,
        "batched": [
            *flags,
            "--enable_batching",
            f"--batching_parameters_file={parameters}",
        ],
    }
    figures: dict[str, list[float]] = {name: [] for name in ways}
    with contextlib.ExitStack() as stack:
        servers = {}
        for name, own in ways.items():
            place = directory / name
            place.mkdir()
            server = stack.enter_context(running_server(place, *own))
            server.wait_for("Running gRPC ModelServer")
            servers[name] = server.socket
        for turn in range(BATCH_TURNS + 1):
            for name, socket in servers.items():
                rate = _images_per_s(socket)
                if turn:  # the first one warms up
                    figures[name].append(rate)
    return {name: statistics.median(rates) for name, rates in figures.items()}


def _images_per_s(socket: Path) -> float:
    """Return how many images a server answers in a second, one in each request."""
    import threading

    from tests.model_server.running import Caller, predict_request

    request = predict_request("resnet", input=image())
    end_s = time.perf_counter() + BATCH_TURN_S
    counts = []

    def client() -> None:
        caller, count = Caller(socket), 0
        while time.perf_counter() < end_s:
            caller.predict(request)
            count += 1
        caller.close()
        counts.append(count)

    started_s = time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - started_s)


def _ms(call: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    call()
    return (time.perf_counter() - started_s) * 1000


if __name__ == "__main__":
    part, where = sys.argv[1], Path(sys.argv[2])
    if part == "double":
        double(where)
    else:
        parts = {
            "client": client,
            "tf_client": tf_client,
            "drop_in": drop_in,
            "batching": batching,
            "resnet": make_resnet,
        }
        print(json.dumps(parts[part](where)))
