"""The program: listen, load, serve, drain.

Unlike the original, which binds its port when every model is loaded, this one listens at once:
so that GetModelStatus can say LOADING, and which directory has no version. Until then Predict
answers NOT_FOUND. A model that cannot be loaded ends the program (255), as in the original;
once every model was available, a bad new version harms nothing.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent import futures

import grpc

import tdxd
from tdxd.model_server.flags import Flags, StartError, parse_flags, usage
from tdxd.model_server.lifecycle import Lifecycle, RetryPolicy
from tdxd.model_server.model_config import ModelConfig, parse_model_config
from tdxd.model_server.registry import Registry, Servable

__all__ = ["main"]

_DRAIN_LIMIT_S = 300.0
"""Longest wait for calls in progress; whoever sent SIGTERM usually waits less, then kills."""
_IDLE_S = 3600.0


def main(argv: Sequence[str]) -> int:
    """Run the server until SIGTERM or SIGINT.

    Raises: StartError.
    """
    flags = parse_flags(argv)
    if flags.help:
        sys.stdout.write(usage() + "\n")
        return 0
    if flags.version:
        sys.stdout.write(_version_text() + "\n")
        return 0
    models = _models(flags)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    for note in flags.notes:
        _log(note)
    return _run(flags, models, stop)


def _version_text() -> str:
    """Return two lines in the original's form; its number says which flags are known."""
    api = importlib.metadata.version("tensorflow-serving-api")
    library = importlib.metadata.version("tensorflow")
    return (
        f"TensorFlow ModelServer: {api}+tdx-model-server.{tdxd.__version__}\n"
        f"TensorFlow Library: {library}"
    )


def _models(flags: Flags) -> tuple[ModelConfig, ...]:
    if not flags.model_config_file:
        one = ModelConfig(name=flags.model_name, base_path=flags.model_base_path)
        return (one,)
    try:
        with open(flags.model_config_file, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as exc:
        raise StartError(f"--model_config_file: {exc}") from exc
    return parse_model_config(text, source=flags.model_config_file)


def _run(flags: Flags, models: tuple[ModelConfig, ...], stop: threading.Event) -> int:
    from tdxd.model_server.loader import start_tensorflow

    start_tensorflow(
        intra_op_threads=flags.intra_op_threads, inter_op_threads=flags.inter_op_threads
    )
    registry = Registry({model.name: model.labels for model in models})
    lifecycle = Lifecycle(
        models=models,
        registry=registry,
        retry=RetryPolicy(
            retries=flags.load_retries, interval_s=flags.load_retry_interval_s
        ),
        list_names=os.listdir,
        load=lambda path: _load(path, flags),
        log=_log,
    )
    server, address = _listen(flags, registry)
    outcome = _Outcome()
    loader = threading.Thread(
        target=_keep_loaded,
        args=(lifecycle, flags.poll_wait_s, address, stop, outcome),
        daemon=True,
        name="loader",
    )
    loader.start()
    stop.wait()
    _log("Draining")
    server.stop(_DRAIN_LIMIT_S).wait()
    loader.join(1.0)
    if loader.is_alive():
        # Inside a load: the interpreter cannot end cleanly around that thread.
        os._exit(0)
    if outcome.failure:
        raise StartError(f"Failed to start server. Error: Unknown: {outcome.failure}")
    return 0


def _load(path: str, flags: Flags) -> Servable:
    """Load a model and warm it up.

    Raises: RpcFailure.
    """
    from tdxd.model_server.loader import load_saved_model
    from tdxd.model_server.warmup import warm_up

    servable = load_saved_model(path, tags=flags.saved_model_tags)
    warm_up(servable, path, rounds=flags.warmup_rounds, log=_log)
    return servable


@dataclasses.dataclass(slots=True)
class _Outcome:
    """How the loader thread ended; what stands here if it dies is this."""

    failure: str = "the loader thread ended unexpectedly"


def _listen(flags: Flags, registry: Registry) -> tuple[grpc.Server, str]:
    from tdxd.model_server.servicer import handlers

    threads = flags.grpc_max_threads or os.cpu_count() or 1
    server = grpc.server(
        futures.ThreadPoolExecutor(threads, thread_name_prefix="predict"),
        handlers=handlers(registry, respond_with_content=flags.respond_with_content),
        options=[
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            # Two servers on one port would each get some of the connections.
            ("grpc.so_reuseport", 0),
            *flags.channel_arguments,
        ],
    )
    addresses = [f"0.0.0.0:{flags.port}"] if flags.port else []
    if flags.grpc_socket_path:
        addresses.append(f"unix:{flags.grpc_socket_path}")
    for address in addresses:
        try:
            bound = server.add_insecure_port(address)
        except RuntimeError:
            bound = 0
        if not bound:
            raise StartError(
                f"Failed to BuildAndStart gRPC server: cannot listen on {address}",
                hint="another program may listen there, or the directory is missing",
            )
    server.start()
    return server, " ".join(addresses)


def _keep_loaded(
    lifecycle: Lifecycle,
    poll_wait_s: int,
    address: str,
    stop: threading.Event,
    outcome: _Outcome,
) -> None:
    """Load what the directories hold until told to stop; however it ends, the server stops."""
    try:
        outcome.failure = _load_loop(lifecycle, poll_wait_s, address, stop)
    finally:
        stop.set()


def _load_loop(
    lifecycle: Lifecycle, poll_wait_s: int, address: str, stop: threading.Event
) -> str:
    """Return why the server could not start, or nothing once told to stop."""
    ready = False
    next_scan_s = time.monotonic() if poll_wait_s >= 0 else None
    while not stop.is_set():
        now_s = time.monotonic()
        if next_scan_s is not None and next_scan_s <= now_s:
            lifecycle.scan()
            next_scan_s = now_s + poll_wait_s if poll_wait_s > 0 else None
        lifecycle.step(now_s)
        if not ready and lifecycle.complete():
            ready = True
            _log(f"Running gRPC ModelServer at {address} ...")
        if not ready and lifecycle.boot_failure():
            return lifecycle.boot_failure()
        due = [when for when in (next_scan_s, lifecycle.next_due_s()) if when]
        wait_s = min(due, default=now_s + _IDLE_S) - time.monotonic()
        stop.wait(max(wait_s, 0.0))
    return ""


def _log(text: str) -> None:
    sys.stderr.write(f"tdx-model-server: {text}\n")
    sys.stderr.flush()
