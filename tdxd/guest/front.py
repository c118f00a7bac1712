"""The TLS front as a child: HAProxy on sockets that the daemon owns."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import signal
import socket

import trio

from tdxd.core.config import ServingConfig
from tdxd.errors import NotReadyError
from tdxd.guest.handover import HandedFront, ServedVolume
from tdxd.host import content, haproxy
from tdxd.host.ports import Cell, Child, ChildSpec, Host

__all__ = ["Front", "adopt_front", "certificate_of", "front_key", "start_front"]

_EXIT_S = 3.0
_KEPT_LINES = 10


class Front:
    """A running front. `key` names its settings, `active` the slot it routes to."""

    def __init__(
        self,
        *,
        key: str,
        active: str,
        child: Child,
        cell: Cell,
        api: haproxy.RuntimeApi,
    ) -> None:
        self.key, self.active, self.child = key, active, child
        self.lines: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
        self.silent = trio.Event()
        """Set once it has said its last words."""
        self._cell = cell
        self._api = api

    async def switch(self, slot: str) -> None:
        """Route new streams to `slot` and none to the other.

        Raises: NotReadyError.
        """
        other = "b" if slot == "a" else "a"
        await self._api.activate(slot, others=(other,))
        self.active = slot

    async def forget(self, slot: str) -> None:
        """Take a slot out of rotation whose server is gone.

        Raises: NotReadyError.
        """
        await self._api.disable(slot)

    async def streams(self, slot: str) -> int:
        """Return how many streams go to a slot.

        Raises: NotReadyError.
        """
        return await self._api.streams(slot)

    async def stop(self, drain_s: float) -> None:
        """Let open streams end within `drain_s`, then end the process."""
        await self.child.stop(drain_s + _EXIT_S, signal=signal.SIGUSR1)
        self.close()

    def close(self) -> None:
        """Let go of the cell; the process must have ended."""
        self._cell.close()

    def hand_over(self, host: Host) -> HandedFront:
        """Return what the program after this one needs to go on with it."""
        return HandedFront(
            key=self.key,
            active=self.active,
            child=host.children.hand_over(self.child, self._cell),
            admin_path=self._api.path,
            lines=tuple(self.lines),
        )


def adopt_front(handed: HandedFront, host: Host) -> Front:
    """Go on with the front of the program before this one.

    Raises: HostError if there is no such child.
    """
    child, cell = host.children.adopt(handed.child)
    front = Front(
        key=handed.key,
        active=handed.active,
        child=child,
        cell=cell,
        api=haproxy.RuntimeApi(handed.admin_path),
    )
    front.lines.extend(handed.lines)
    return front


def start_front(
    *,
    host: Host,
    config: ServingConfig,
    runtime_dir: str,
    listener: socket.socket,
    certificate: bytes,
    key: str,
    active: str,
) -> Front:
    """Start HAProxy on the listener with a certificate that stays in memory.

    Raises: HostError; nothing is left running.
    """
    directory = os.path.join(runtime_dir, "front")
    serve_dir = os.path.join(runtime_dir, "serve")
    os.makedirs(directory, exist_ok=True)
    os.chmod(directory, 0o755)  # noqa: S103 — the front's user reads the configuration in it
    api = haproxy.RuntimeApi(os.path.join(directory, "admin.sock"))
    with contextlib.ExitStack() as stack:
        admin = stack.enter_context(api.listen())
        certificate_fd = haproxy.secret_memfd("tdxd:certificate", certificate)
        stack.callback(os.close, certificate_fd)
        spec = haproxy.FrontSpec(
            grpc_fd=listener.fileno(),
            certificate_fd=certificate_fd,
            admin_fd=admin.fileno(),
            serve_dir=serve_dir,
            active=active,
            drain_timeout_s=config.drain_timeout_s,
        )
        path = _write_configuration(directory, spec)
        binds = [(serve_dir, serve_dir), (directory, directory)]
        cell = host.children.make_cell(hide=runtime_dir, binds=binds)
        child_spec = ChildSpec(
            name="front",
            argv=(config.haproxy, "-db", "-f", path),
            user=config.user,
            cell=cell,
            pass_fds=(listener.fileno(), certificate_fd, admin.fileno()),
        )
        child = host.children.spawn(child_spec)
    return Front(key=key, active=active, child=child, cell=cell, api=api)


def _write_configuration(directory: str, spec: haproxy.FrontSpec) -> str:
    path = os.path.join(directory, "haproxy.cfg")
    with open(path, "w", encoding="utf-8") as file:
        file.write(haproxy.configuration(spec))
    os.chmod(path, 0o644)  # holds no secret, and the front runs under another uid
    return path


def certificate_of(volume_id: str | None, mount_points: dict[str, str]) -> bytes:
    """Return the certificate of the volume that supplies it.

    Raises: NotReadyError if no volume is named, or it is not mounted; MissingError.
    """
    if volume_id is None:
        raise NotReadyError(
            "no volume supplies the front's certificate",
            hint="name one in serving.tls_volume",
        )
    if volume_id not in mount_points:
        raise NotReadyError(
            f"volume {volume_id}, which holds the certificate, is not mounted"
        )
    return content.read_certificate(mount_points[volume_id])


def front_key(
    volumes: tuple[ServedVolume, ...], config: ServingConfig, tls_volume: str | None
) -> str:
    """Return a key that differs when the front must be another process."""
    tls = [one for one in volumes if one.volume_id == tls_volume]
    names = [f"{one.volume_id}@{one.generation}" for one in tls]
    text = json.dumps([config.listen, config.user, config.haproxy, names])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
