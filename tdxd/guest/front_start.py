"""Starts the front: its sockets, certificates and configuration, its cell and confinement."""

from __future__ import annotations

import dataclasses
import os
import socket

import trio

from tdxd.core.serving_config import ServingConfig
from tdxd.errors import DataError, ServerExitedError
from tdxd.guest import isolation
from tdxd.guest.certificates import Certificates
from tdxd.guest.front import Front
from tdxd.host import haproxy, haproxy_config, haproxy_refusals
from tdxd.host.ports import ChildSpec, Host

__all__ = ["Sockets", "evidence_path", "start_front"]

_CHECK_S = 20.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sockets:
    """What the front listens on."""

    grpc: socket.socket
    rest: socket.socket | None = None


def evidence_path(runtime_dir: str) -> str:
    """Return where the daemon listens for clients who ask, through the front, for evidence."""
    return os.path.join(runtime_dir, "front", "evidence.sock")


async def start_front(
    *,
    host: Host,
    config: ServingConfig,
    runtime_dir: str,
    sockets: Sockets,
    certificates: Certificates,
    key: str,
    active: str,
) -> Front:
    """Start HAProxy on the sockets, with certificates that stay in memory.

    Raises: ServerExitedError if it refuses its configuration, HostError, DataError for
    certificates that it takes and we do not; nothing is left running.
    """
    directory = os.path.join(runtime_dir, "front")
    os.makedirs(directory, exist_ok=True)
    os.chmod(directory, 0o755)  # noqa: S103 — the front's user reads the configuration in it
    api = haproxy.RuntimeApi(os.path.join(directory, "admin.sock"))
    with api.listen() as admin, certificates.in_memory() as (server_fd, client_ca_fd):
        front = haproxy_config.FrontSpec(
            config=config,
            grpc_fd=sockets.grpc.fileno(),
            rest_fd=sockets.rest.fileno() if sockets.rest else None,
            certificate_fd=server_fd,
            client_ca_fd=client_ca_fd,
            admin_fd=admin.fileno(),
            serve_dir=os.path.join(runtime_dir, "serve"),
            active=active,
            service_path=os.path.join(directory, "refuse.lua"),
            evidence_path=evidence_path(runtime_dir) if config.attest else None,
        )
        spec = _child(host, front, runtime_dir, directory)
        await _check(host, spec)
        try:
            certificates.check()
        except DataError:
            spec.cell.close()
            raise
        child = host.children.spawn(spec)
    made = Front(key=key, active=active, child=child, cell=spec.cell, api=api)
    made.now_has(certificates)
    return made


def _child(
    host: Host, front: haproxy_config.FrontSpec, runtime_dir: str, directory: str
) -> ChildSpec:
    """Write the configuration, and make the cell where it is used."""
    config = front.config
    path = _write_configuration(directory, front)
    binds = [(front.serve_dir, front.serve_dir), (directory, directory)]
    fds = (
        front.grpc_fd,
        front.rest_fd,
        front.certificate_fd,
        front.client_ca_fd,
        front.admin_fd,
    )
    return ChildSpec(
        name="front",
        argv=(config.haproxy, "-db", "-f", path),
        user=isolation.front_user(config),
        cell=host.children.make_cell(hide=runtime_dir, binds=binds),
        pass_fds=tuple(fd for fd in fds if fd is not None),
        confinement=isolation.of_front(config, directory),
    )


async def _check(host: Host, spec: ChildSpec) -> None:
    """Have HAProxy check its configuration, in its cell and with its descriptors.

    Raises: ServerExitedError with its own words; the cell is closed then. HostError.
    """
    argv = (spec.argv[0], "-c", *spec.argv[1:])
    child = host.children.spawn(
        dataclasses.replace(spec, name="front-check", argv=argv)
    )
    lines: list[str] = []
    status = -1
    try:
        with trio.move_on_after(_CHECK_S):
            lines = [line async for line in child.lines()]
            status = await child.wait()
    finally:
        with trio.CancelScope(shield=True):
            await child.stop(0)
        if status != 0:
            spec.cell.close()
    if status != 0:
        alerts = [line for line in lines if "[ALERT]" in line] or lines
        said = "; ".join(line.strip()[:300] for line in alerts[:3]) or "nothing"
        raise ServerExitedError(
            f"{spec.argv[0]} refuses the front's configuration: it said {said}",
            hint="is tls/server.pem a certificate with its key, and HAProxy 2.6 or later?",
        )


def _write_configuration(directory: str, spec: haproxy_config.FrontSpec) -> str:
    path = os.path.join(directory, "haproxy.cfg")
    service = haproxy_refusals.service_text(spec.config.max_request_bytes)
    for name, text in (
        (path, haproxy_config.configuration(spec)),
        (spec.service_path, service),
    ):
        with open(name, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)  # holds no secret, and the front runs under another uid
    return path
