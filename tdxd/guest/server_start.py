"""Starts a model server: what it serves, with which flags, in which cell, confined how."""

from __future__ import annotations

import os
import shutil
from functools import partial

from tdxd.core import server_files
from tdxd.core.serving_config import ServingConfig
from tdxd.errors import HostError, ServeError
from tdxd.guest import isolation
from tdxd.guest.handover import ServedVolume
from tdxd.guest.server import ModelServer, models_key
from tdxd.guest.server_program import ServerProgram
from tdxd.guest.volume_reader import VolumeReader
from tdxd.host import content, haproxy_config
from tdxd.host.ports import Cell, ChildSpec, Host, PrivateTmp
from tdxd.host.proc import user_ids

__all__ = ["Offered", "check_models", "offered_by", "start_server"]

_TMP_BYTES = 64 * 2**20
Offered = tuple[tuple[ServedVolume, tuple[content.Model, ...]], ...]
"""Volumes with the models in them."""


async def offered_by(
    volumes: tuple[ServedVolume, ...], reader: VolumeReader
) -> Offered:
    """Look which models these volumes have.

    Raises: NotReadyError, StalledError, HostError.
    """
    found = []
    for one in volumes:
        look = partial(content.models_in, one.mount_point)
        found.append((one, await reader.read(one.mount_point, look)))
    return tuple(found)


def start_server(
    *,
    host: Host,
    config: ServingConfig,
    program: ServerProgram,
    runtime_dir: str,
    slot: str,
    offered: Offered,
) -> ModelServer:
    """Start a model server in its cell, where it sees nothing but these volumes' models.

    Raises: ServeError, HostError; nothing is left running.
    """
    binds, base_paths, models = _collect(offered, runtime_dir)
    volumes = tuple(volume for volume, _models in offered)
    socket_dir = os.path.join(runtime_dir, "serve", slot)
    _fresh_directory(socket_dir, config.user, isolation.front_user(config))
    paths = _write_files(config, socket_dir, slot, base_paths)
    visible = [target for _source, target in binds]
    cell = _cell(host, config, runtime_dir, [*binds, (socket_dir, socket_dir)])
    spec = _child(config, program, runtime_dir, slot, cell, paths, visible)
    return ModelServer(
        slot=slot,
        key=models_key(volumes, config),
        volumes=volumes,
        models=models,
        child=host.children.spawn(spec),
        cell=cell,
        socket_path=paths.socket,
    )


def check_models(offered: Offered) -> None:
    """Check that one model server can serve all these volumes.

    Raises: ServeError.
    """
    _collect(offered, "")


def _child(
    config: ServingConfig,
    program: ServerProgram,
    runtime_dir: str,
    slot: str,
    cell: Cell,
    paths: server_files.ServerPaths,
    visible: list[str],
) -> ChildSpec:
    tmp = _tmp(runtime_dir)
    return ChildSpec(
        name=f"model-server-{slot}",
        argv=(program.path, *server_files.flags(config, program.version, paths)),
        user=config.user,
        cell=cell,
        confinement=isolation.of_server(
            config,
            program.path,
            read=visible,
            sockets=[os.path.dirname(paths.socket)],
            tmp=tmp,
            rest_port=paths.rest_port,
        ),
        limits=isolation.limits_of(config),
        # Keras writes to its home; without one it looks for what others left in /tmp.
        env={"TF_CPP_MIN_LOG_LEVEL": "1", "TMPDIR": tmp, "HOME": tmp},
    )


def _cell(
    host: Host, config: ServingConfig, runtime_dir: str, binds: list[tuple[str, str]]
) -> Cell:
    tmp = PrivateTmp(path=_tmp(runtime_dir), user=config.user, size_bytes=_TMP_BYTES)
    return host.children.make_cell(hide=runtime_dir, binds=binds, tmp=tmp)


def _tmp(runtime_dir: str) -> str:
    return os.path.join(runtime_dir, "tmp")


def _collect(
    offered: Offered, runtime_dir: str
) -> tuple[list[tuple[str, str]], dict[str, str], tuple[content.Model, ...]]:
    """Return the binds of all `models/` directories, and each model with its new place."""
    binds: list[tuple[str, str]] = []
    owners: dict[str, str] = {}
    base_paths: dict[str, str] = {}
    models: list[content.Model] = []
    for volume, found in offered:
        source = os.path.join(volume.mount_point, "models")
        target = os.path.join(runtime_dir, "models", volume.volume_id)
        binds.append((source, target))
        for model in found:
            if model.name in owners:
                raise ServeError(
                    f"model {model.name!r} is in volumes {owners[model.name]} "
                    f"and {volume.volume_id}",
                    hint="a model server names models without their volume: rename one",
                )
            owners[model.name] = volume.volume_id
            base_paths[model.name] = os.path.join(target, model.name)
            models.append(model)
    return binds, base_paths, tuple(models)


def _write_files(
    config: ServingConfig, directory: str, slot: str, base_paths: dict[str, str]
) -> server_files.ServerPaths:
    """Write what the server reads; return where all is."""
    texts = {"models": server_files.model_text(config, base_paths)}
    if config.batching is not None:
        texts["batching"] = server_files.batching_text(config.batching)
    if config.monitoring:
        path = haproxy_config.METRICS_PATH
        texts["monitoring"] = server_files.monitoring_text(path)
    paths = {name: os.path.join(directory, f"{name}.config") for name in texts}
    for name, text in texts.items():
        _write(paths[name], text)
    rest = None if config.rest_listen is None else haproxy_config.rest_port(slot)
    return server_files.ServerPaths(
        socket=haproxy_config.server_address(os.path.dirname(directory), slot),
        models=paths["models"],
        rest_port=rest,
        batching=paths.get("batching"),
        monitoring=paths.get("monitoring"),
    )


def _fresh_directory(path: str, user: str, front_user: str) -> None:
    """Make an empty socket directory for that user, reachable by the front and the daemon alone.

    The daemon is uid 0 without capabilities: in the group of the directory. The front passes
    through the one above, which is closed to all others.
    """
    uid, _gid = user_ids(user)
    _uid, front_gid = user_ids(front_user)
    above = os.path.dirname(path)
    try:
        shutil.rmtree(path, ignore_errors=True)
        os.makedirs(path)
        os.chmod(above, 0o750)  # noqa: S103 — the front passes through
        os.chown(above, 0, front_gid)
        os.chmod(path, 0o771)  # noqa: S103 — see above
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
