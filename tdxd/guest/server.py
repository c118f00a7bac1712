"""One model server process, in one slot of the front, over one set of mounted volumes."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable

import trio

from tdxd.core.config import ServingConfig
from tdxd.errors import (
    ConfigError,
    HostError,
    NotReadyError,
    ServeError,
    ServerExitedError,
    TdxdError,
)
from tdxd.guest.handover import HandedServer, ServedVolume
from tdxd.host import content, haproxy
from tdxd.host.model_status import ModelStatusClient
from tdxd.host.ports import Cell, Child, ChildSpec, Host
from tdxd.host.proc import user_ids

__all__ = [
    "ModelServer",
    "adopt_server",
    "exited_error",
    "models_key",
    "server_command",
    "start_server",
]

_KEPT_LINES = 50


def models_key(volumes: tuple[ServedVolume, ...], config: ServingConfig) -> str:
    """Return a key that differs when a server for these volumes must be another process."""
    parts = [f"{one.volume_id}@{one.generation}" for one in volumes]
    text = json.dumps([sorted(parts), config.command, config.user])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def server_command(config: ServingConfig) -> tuple[str, ...]:
    """Return the configured model server, else the installed one, else the drop-in.

    Raises: ConfigError if there is none.
    """
    if config.command is not None:
        return (config.command,)
    beside = os.path.join(os.path.dirname(sys.executable), "tdx-model-server")
    for name in ("tensorflow_model_server", "tdx-model-server", beside):
        found = shutil.which(name)
        if found:
            return (found,)
    raise ConfigError(
        "no model server is installed",
        hint="install tensorflow_model_server or tdxd[model-server], or set serving.command",
    )


class ModelServer:
    """A running model server. `key` names what it serves and how, `models` what it offers."""

    def __init__(
        self,
        *,
        slot: str,
        key: str,
        volumes: tuple[ServedVolume, ...],
        models: tuple[content.Model, ...],
        child: Child,
        cell: Cell,
        socket_path: str,
    ) -> None:
        self.slot, self.key, self.volumes, self.models = slot, key, volumes, models
        self.child, self.cell = child, cell
        self.ready = False
        self.drained = False
        self.leaving = False
        """Whether its end is our doing."""
        self.drain_until_s: float | None = None
        self.started_s = trio.current_time()
        self.lines: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
        self.silent = trio.Event()
        """Set once it has said its last words."""
        self._socket_path = socket_path
        self._status = ModelStatusClient(socket_path)

    def sees_any(self, volumes: frozenset[tuple[str, int | None]]) -> bool:
        """Say whether it was started on one of these (volume id, generation)."""
        return any((one.volume_id, one.generation) in volumes for one in self.volumes)

    async def poll(self) -> None:
        """Ask for the state of every model; sets `ready` once all are available.

        Raises: NotReadyError with the server's own words if a model failed to load.
        """
        for model in self.models:
            try:
                seen = await self._status.versions(model.name)
            except TdxdError:
                return  # not listening yet; the caller watches the clock
            failed = [one for one in seen if one.failed]
            if failed:
                raise NotReadyError(
                    f"model {model.name!r} version {failed[0].version}: {failed[0].error}",
                    hint="the model server's own words; see: tdxctl events",
                )
            if not any(one.available for one in seen):
                return
        self.ready = True

    def close(self) -> None:
        """Let go of the cell and the channel; the process must have ended."""
        self._status.close()
        self.cell.close()

    def hand_over(self, host: Host) -> HandedServer:
        """Return what the program after this one needs to go on with it."""
        now_s, until_s = trio.current_time(), self.drain_until_s
        return HandedServer(
            slot=self.slot,
            key=self.key,
            volumes=self.volumes,
            models=self.models,
            child=host.children.hand_over(self.child, self.cell),
            socket_path=self._socket_path,
            ready=self.ready,
            drained=self.drained,
            age_s=now_s - self.started_s,
            drain_left_s=None if until_s is None else until_s - now_s,
            lines=tuple(self.lines),
        )


def adopt_server(handed: HandedServer, host: Host) -> ModelServer:
    """Go on with a model server of the program before this one.

    Raises: HostError if there is no such child.
    """
    child, cell = host.children.adopt(handed.child)
    server = ModelServer(
        slot=handed.slot,
        key=handed.key,
        volumes=handed.volumes,
        models=handed.models,
        child=child,
        cell=cell,
        socket_path=handed.socket_path,
    )
    now_s = trio.current_time()
    server.ready, server.drained = handed.ready, handed.drained
    server.started_s = now_s - handed.age_s
    if handed.drain_left_s is not None:
        server.drain_until_s = now_s + handed.drain_left_s
    server.lines.extend(handed.lines)
    return server


def start_server(
    *,
    host: Host,
    config: ServingConfig,
    runtime_dir: str,
    slot: str,
    volumes: tuple[ServedVolume, ...],
) -> ModelServer:
    """Start a model server in its cell, where it sees nothing but these volumes' models.

    Raises: ServeError, NotReadyError, HostError; nothing is left running.
    """
    places, models = _collect(volumes, runtime_dir)
    socket_dir = os.path.join(runtime_dir, "serve", slot)
    _fresh_directory(socket_dir, config.user)
    config_path = os.path.join(runtime_dir, "serve", slot, "models.config")
    _write(config_path, _model_config(models, runtime_dir))
    socket_path = haproxy.server_address(os.path.join(runtime_dir, "serve"), slot)
    cell = host.children.make_cell(
        hide=runtime_dir, binds=[*places, (socket_dir, socket_dir)]
    )
    spec = ChildSpec(
        name=f"model-server-{slot}",
        argv=(*server_command(config), *_flags(socket_path, config_path)),
        user=config.user,
        cell=cell,
        env={"TF_CPP_MIN_LOG_LEVEL": "1"},
    )
    child = host.children.spawn(spec)
    return ModelServer(
        slot=slot,
        key=models_key(volumes, config),
        volumes=volumes,
        models=tuple(model for model, _volume in models.values()),
        child=child,
        cell=cell,
        socket_path=socket_path,
    )


Models = dict[str, tuple[content.Model, str]]


def _collect(
    volumes: tuple[ServedVolume, ...], runtime_dir: str
) -> tuple[list[tuple[str, str]], Models]:
    """Return the binds of all `models/` directories, and each model with its volume."""
    binds, models = [], Models()
    for volume in volumes:
        source = os.path.join(volume.mount_point, "models")
        binds.append((source, os.path.join(runtime_dir, "models", volume.volume_id)))
        for model in content.models_in(volume.mount_point):
            if model.name in models:
                raise ServeError(
                    f"model {model.name!r} is in volumes {models[model.name][1]} "
                    f"and {volume.volume_id}",
                    hint="a model server names models without their volume: rename one",
                )
            models[model.name] = (model, volume.volume_id)
    return binds, models


def _model_config(models: Models, runtime_dir: str) -> str:
    """Return a ModelServerConfig in protobuf's text format (model_server_config.proto)."""
    entries = []
    for name, (_model, volume_id) in sorted(models.items()):
        base_path = os.path.join(runtime_dir, "models", volume_id, name)
        entries.append(
            f"  config {{ name: {json.dumps(name)} base_path: {json.dumps(base_path)} "
            'model_platform: "tensorflow" }\n'
        )
    return "model_config_list {\n" + "".join(entries) + "}\n"


def _flags(socket_path: str, config_path: str) -> tuple[str, ...]:
    """Return flags that TensorFlow Serving 2.11 and later and the drop-in understand.

    No TCP port; a failing model is tried twice, not for five minutes; one load thread, since
    with none a failing model stalls all others inside the server's own loop.
    """
    return (
        "--port=0",
        "--rest_api_port=0",
        f"--grpc_socket_path={socket_path}",
        f"--model_config_file={config_path}",
        "--max_num_load_retries=1",
        "--load_retry_interval_micros=2000000",
        "--num_load_threads=1",
        "--enable_profiler=false",
    )


def _fresh_directory(path: str, user: str) -> None:
    """Make an empty socket directory for that user, reachable by uid 0 without capabilities."""
    uid, _gid = user_ids(user)
    try:
        shutil.rmtree(path, ignore_errors=True)
        os.makedirs(path)
        os.chmod(os.path.dirname(path), 0o755)  # noqa: S103 — the user passes through
        os.chmod(path, 0o770)  # noqa: S103 — group 0: the daemon, without CAP_DAC_OVERRIDE
        os.chown(path, uid, 0)
    except OSError as exc:
        raise HostError.of("prepare", path, exc) from exc


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(path, 0o644)
    except OSError as exc:
        raise HostError.of("write", path, exc) from exc


def exited_error(what: str, status: int, lines: Iterable[str]) -> ServerExitedError:
    """Return the error of a child that ended by itself, with its last words."""
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    last = next((line for line in reversed(list(lines)) if line.strip()), "nothing")
    text = f"{what} ended {how}; it said last: {last[:300]}"
    return ServerExitedError(text, hint="its output: tdxctl events")
