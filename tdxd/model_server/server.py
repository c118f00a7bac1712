"""The program: listen, load, serve, drain.

Unlike the original, which binds its port when every model is loaded, this one listens at once:
so that GetModelStatus can say LOADING, and which directory has no version. Until then Predict
answers NOT_FOUND. A model that cannot be loaded ends the program (255), as in the original;
once every model was available, a bad new version harms nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent import futures

import grpc

import tdxd
from tdxd.model_server.flags import Flags, StartError, parse_flags, usage
from tdxd.model_server.model_config import ModelConfig, parse_model_config
from tdxd.model_server.registry import Registry

__all__ = ["main"]

TYPE_CHECKING = False  # what these import takes time that --help does not have
if TYPE_CHECKING:
    from tdxd.model_server.calls import Calls
    from tdxd.model_server.health import Health
    from tdxd.model_server.http_server import HttpServer
    from tdxd.model_server.load_loop import ConfigFile, LoadLoop
    from tdxd.model_server.loading import Loading
    from tdxd.model_server.metrics import Metrics
    from tdxd.model_server.servicer import Reload

_DRAIN_LIMIT_S = 300.0
"""Longest wait for calls in progress; whoever sent SIGTERM usually waits less, then kills."""
_BATCHING_THREADS = 64
"""Threads for calls when these are batched: nearly all of them wait for their batch."""


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
    models, config_file = _models(flags)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    for note in flags.notes:
        _log(note)
    return _run(flags, models, config_file, stop)


def _version_text() -> str:
    """Return two lines in the original's form; its number says which flags are known."""
    api = importlib.metadata.version("tensorflow-serving-api")
    library = importlib.metadata.version("tensorflow")
    return (
        f"TensorFlow ModelServer: {api}+tdx-model-server.{tdxd.__version__}\n"
        f"TensorFlow Library: {library}"
    )


def _models(flags: Flags) -> tuple[tuple[ModelConfig, ...], ConfigFile | None]:
    from tdxd.model_server.load_loop import ConfigFile
    from tdxd.model_server.loading import read_file

    path = flags.model_config_file
    if not path:
        one = ModelConfig(name=flags.model_name, base_path=flags.model_base_path)
        return (one,), None
    read = functools.partial(read_file, path, "--model_config_file")
    parse = functools.partial(parse_model_config, source=path)
    text = read()
    file = ConfigFile(
        text=text, poll_wait_s=flags.config_poll_wait_s, read=read, parse=parse
    )
    return parse(text), file


def _run(
    flags: Flags,
    models: tuple[ModelConfig, ...],
    config_file: ConfigFile | None,
    stop: threading.Event,
) -> int:
    running = _start(flags, models, config_file)
    outcome = _Outcome()
    loader = threading.Thread(
        target=_keep_loaded,
        args=(running, stop, outcome),
        daemon=True,
        name="loader",
    )
    loader.start()
    stop.wait()
    running.drain()
    loader.join(1.0)
    if loader.is_alive():
        # Inside a load: the interpreter cannot end cleanly around that thread.
        os._exit(0)
    if outcome.failure:
        raise StartError(f"Failed to start server. Error: Unknown: {outcome.failure}")
    return 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    """The parts of a server that listens. `addresses` are those of gRPC."""

    loop: LoadLoop
    loading: Loading
    health: Health
    server: grpc.Server
    addresses: Sequence[str]
    rest: HttpServer | None

    def drain(self) -> None:
        """Let the calls in progress end; gRPC and REST stop to listen at once."""
        _log("Draining")
        self.loop.stop()
        self.health.drain()
        self.loading.drain()
        stopped = self.server.stop(_DRAIN_LIMIT_S)
        if self.rest is not None:
            self.rest.drain(_DRAIN_LIMIT_S)
        stopped.wait()


def _start(
    flags: Flags, models: tuple[ModelConfig, ...], config_file: ConfigFile | None
) -> _Running:
    """Make everything and listen; nothing is loaded yet.

    Raises: StartError.
    """
    from tdxd.model_server.calls import Calls
    from tdxd.model_server.health import Health
    from tdxd.model_server.loader import start_tensorflow
    from tdxd.model_server.loading import Loading
    from tdxd.model_server.metrics import Metrics

    metrics_path = _metrics_path(flags)
    loading = Loading(flags, _log)
    start_tensorflow(
        intra_op_threads=flags.intra_op_threads, inter_op_threads=flags.inter_op_threads
    )
    registry, health, metrics = Registry({}), Health(), Metrics()
    calls = Calls(
        registry,
        metrics,
        respond_with_content=flags.respond_with_content,
        check_method=flags.check_method,
    )
    loop = _load_loop(flags, models, config_file, registry, health, loading)
    server, addresses = _listen(flags, calls, loop.reload, health)
    return _Running(
        loop=loop,
        loading=loading,
        health=health,
        server=server,
        addresses=addresses,
        rest=_listen_rest(flags, calls, metrics, metrics_path),
    )


def _load_loop(
    flags: Flags,
    models: tuple[ModelConfig, ...],
    config_file: ConfigFile | None,
    registry: Registry,
    health: Health,
    loading: Loading,
) -> LoadLoop:
    from tdxd.model_server.lifecycle import Lifecycle, RetryPolicy
    from tdxd.model_server.load_loop import LoadLoop

    registry.configure({model.name: model.labels for model in models})
    lifecycle = Lifecycle(
        models=models,
        registry=registry,
        retry=RetryPolicy(
            retries=flags.load_retries, interval_s=flags.load_retry_interval_s
        ),
        list_names=os.listdir,
        load=loading.load,
        log=_log,
    )
    return LoadLoop(
        lifecycle,
        registry,
        health,
        poll_wait_s=flags.poll_wait_s,
        spread_labels=flags.spread_labels,
        log=_log,
        config_file=config_file,
    )


@dataclasses.dataclass(slots=True)
class _Outcome:
    """How the loader thread ended; what stands here if it dies is this."""

    failure: str = "the loader thread ended unexpectedly"


def _keep_loaded(running: _Running, stop: threading.Event, outcome: _Outcome) -> None:
    """Load what the directories hold until told to stop; however it ends, the server stops."""
    where = " ".join(running.addresses)
    on_ready = functools.partial(_log, f"Running gRPC ModelServer at {where} ...")
    try:
        outcome.failure = running.loop.run(on_ready)
    finally:
        stop.set()


def _listen(
    flags: Flags, calls: Calls, reload: Reload, health: Health
) -> tuple[grpc.Server, list[str]]:
    from tdxd.model_server.servicer import handlers

    quick = futures.ThreadPoolExecutor(1, thread_name_prefix="status")
    services = handlers(calls, reload, quick)
    if flags.health_service:
        services.append(health.handler(quick))
    threads = flags.grpc_max_threads or _threads(flags)
    server = grpc.server(
        futures.ThreadPoolExecutor(threads, thread_name_prefix="predict"),
        handlers=services,
        options=_channel_options(flags),
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
    return server, addresses


def _threads(flags: Flags) -> int:
    return _BATCHING_THREADS if flags.batching else os.cpu_count() or 1


def _channel_options(flags: Flags) -> list[tuple[str, int | str]]:
    """Return what is usual here, unless a flag says otherwise: of two values gRPC takes the first.

    Two servers on one port would each get some of the connections.
    """
    usual: dict[str, int | str] = {
        "grpc.max_receive_message_length": -1,
        "grpc.max_send_message_length": -1,
        "grpc.so_reuseport": 0,
    }
    return list((usual | dict(flags.channel_arguments)).items())


def _listen_rest(
    flags: Flags, calls: Calls, metrics: Metrics, metrics_path: str
) -> HttpServer | None:
    from tdxd.model_server.http_exchange import HttpLimits
    from tdxd.model_server.http_server import HttpServer
    from tdxd.model_server.rest_api import RestApi

    if not (flags.rest_port or flags.rest_unix):
        return None
    server = HttpServer(
        RestApi(calls, metrics, metrics_path=metrics_path),
        threads=flags.rest_threads or _threads(flags),
        limits=HttpLimits(answer_s=flags.rest_timeout_s),
    )
    addresses = server.listen(port=flags.rest_port, unix_path=flags.rest_unix)
    _log(f"Exporting HTTP/REST API at {' '.join(addresses)} ...")
    return server


def _metrics_path(flags: Flags) -> str:
    """Return where Prometheus looks, as the monitoring file says; empty: nowhere."""
    from google.protobuf import text_format

    from tdxd.model_server.loading import read_file
    from tdxd.model_server.metrics import METRICS_PATH
    from tdxd.model_server.small_messages import MonitoringConfig

    if not flags.monitoring_config_file:
        return ""
    text = read_file(flags.monitoring_config_file, "--monitoring_config_file")
    config = MonitoringConfig()
    try:
        text_format.Parse(text, config)
    except text_format.ParseError as exc:
        raise StartError(f"{flags.monitoring_config_file}: {exc}") from exc
    if not config.prometheus_config.enable:
        return ""
    path: str = config.prometheus_config.path or METRICS_PATH
    return path


def _log(text: str) -> None:
    sys.stderr.write(f"tdx-model-server: {text}\n")
    sys.stderr.flush()
