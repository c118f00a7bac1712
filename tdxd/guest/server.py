"""One model server process, in one slot of the front, over one set of mounted volumes."""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Iterable

import trio

from tdxd.core.serving_config import ServingConfig
from tdxd.errors import NotReadyError, ServerExitedError, TdxdError
from tdxd.guest.handover import HandedServer, ServedVolume
from tdxd.host import content
from tdxd.host.model_status import ModelStatusClient
from tdxd.host.ports import Cell, Child, Host

__all__ = [
    "ModelServer",
    "adopt_server",
    "exited_error",
    "models_key",
]

_KEPT_LINES = 50


def models_key(volumes: tuple[ServedVolume, ...], config: ServingConfig) -> str:
    """Return a key that differs when a server for these volumes must be another process."""
    parts = [f"{one.volume_id}@{one.generation}" for one in volumes]
    text = json.dumps([sorted(parts), config.of_server()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
            if not any(one.available for one in seen) or any(
                one.pending for one in seen
            ):
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


def exited_error(what: str, status: int, lines: Iterable[str]) -> ServerExitedError:
    """Return the error of a child that ended by itself, with its last words."""
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    last = next((line for line in reversed(list(lines)) if line.strip()), "nothing")
    text = f"{what} ended {how}; it said last: {last[:300]}"
    return ServerExitedError(text, hint="its output: tdxctl events")
