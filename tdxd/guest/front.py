"""The TLS front as a child: HAProxy on sockets that the daemon owns."""

from __future__ import annotations

import collections
import hashlib
import json
import signal

import trio

from tdxd.core.serving_config import ServingConfig
from tdxd.guest.certificates import Certificates
from tdxd.guest.handover import HandedFront
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
    """A running front. `key` names its settings, `active` the slot it routes to, if any."""

    def __init__(
        self,
        *,
        key: str,
        active: str | None,
        child: Child,
        cell: Cell,
        api: haproxy.RuntimeApi,
    ) -> None:
        self.key, self.active, self.child = key, active, child
        self.served_key = b""
        """SHA-256 of the public key of its certificate."""
        self.certificate_sha256 = ""
        """Of the certificate itself, in hex."""
        self.sources: tuple[str, ...] = ()
        """Where its certificates are from."""
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
        self.active = None
        await self._api.disable(slot)

    async def renew(self, certificates: Certificates) -> None:
        """Show other certificates on new connections; those that are open go on.

        Raises: DataError if they cannot be used, NotReadyError; then the old ones are still shown.
        """
        certificates.check()
        from tdxd.core.tls_pem import blocks  # loads cryptography

        client_ca = certificates.client_ca
        await self._api.set_certificates(
            blocks(certificates.server),
            None if client_ca is None else blocks(client_ca),
        )
        self.now_has(certificates)

    def now_has(self, certificates: Certificates) -> None:
        """Note which certificates it shows: ones that were checked."""
        from tdxd.core import endpoint_proof, tls_pem  # load cryptography

        self.served_key = endpoint_proof.key_digest_of_pem(certificates.server)
        self.certificate_sha256 = tls_pem.server_certificate(certificates.server)
        self.sources = certificates.sources

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
            sources=self.sources,
            certificate_sha256=self.certificate_sha256,
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
    front.served_key, front.sources = handed.served_key, handed.sources
    front.certificate_sha256 = handed.certificate_sha256
    front.lines.extend(handed.lines)
    return front


def front_key(config: ServingConfig, *, supplied: bool) -> str:
    """Return a key that differs when the front must be another process.

    `supplied`: whether there is a volume that its certificate is from, if it is to be from one.
    """
    text = json.dumps([config.of_front(), supplied])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
