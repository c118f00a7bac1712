"""The TLS front as a child: HAProxy on sockets that the daemon owns."""

from __future__ import annotations

import collections
import hashlib
import json
import signal

import trio

from tdxd.core.serving_config import ServingConfig
from tdxd.guest.handover import HandedFront, ServedVolume
from tdxd.host import haproxy
from tdxd.host.ports import Cell, Child, Host

__all__ = [
    "Front",
    "adopt_front",
    "front_key",
]

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
        served_key: bytes = b"",
    ) -> None:
        self.key, self.active, self.child = key, active, child
        self.served_key = served_key
        """SHA-256 of the public key of its certificate; empty if clients may not ask for it."""
        self.lines: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
        self.silent = trio.Event()
        """Set once it has said its last words."""
        self._cell = cell
        self._api = api

    @property
    def api(self) -> haproxy.RuntimeApi:
        """Its runtime API."""
        return self._api

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
            served_key=self.served_key,
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
        served_key=handed.served_key,
    )
    front.lines.extend(handed.lines)
    return front


def front_key(
    volumes: tuple[ServedVolume, ...], config: ServingConfig, tls_volume: str | None
) -> str:
    """Return a key that differs when the front must be another process."""
    tls = [one for one in volumes if one.volume_id == tls_volume]
    names = [f"{one.volume_id}@{one.generation}" for one in tls]
    text = json.dumps([config.of_front(), names])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
