"""The front and the sockets it listens on, which outlive it."""

from __future__ import annotations

import trio

from tdxd.core.serving_config import ServingConfig
from tdxd.errors import NotReadyError
from tdxd.guest.certificates import Certificates
from tdxd.guest.front import Front
from tdxd.guest.front_start import Sockets, start_front
from tdxd.guest.handover import HandedListener
from tdxd.guest.listener import Listener
from tdxd.guest.server import exited_error
from tdxd.guest.serving_scene import ServingScene

__all__ = ["FrontDoor"]


class FrontDoor:
    """Starts, watches and ends the front; no queued connection is lost by that."""

    def __init__(self, scene: ServingScene) -> None:
        self.front: Front | None = None
        self._scene = scene
        self._grpc = Listener()
        self._rest = Listener()

    @property
    def sound(self) -> bool:
        """Whether all sockets still listen: whoever inherited one can end that for all."""
        return self._grpc.sound and self._rest.sound

    async def start(
        self, slot: str, config: ServingConfig, key: str, certificates: Certificates
    ) -> None:
        """Start a front that routes to `slot`; a dead socket is made anew.

        Raises: ServerExitedError, HostError.
        """
        rest = None
        if config.rest_listen is not None:
            rest = self._rest.at(config.rest_listen)
        else:
            self._rest.close()
        front = await start_front(
            host=self._scene.host,
            config=config,
            runtime_dir=self._scene.runtime_dir,
            sockets=Sockets(grpc=self._grpc.at(config.listen), rest=rest),
            certificates=certificates,
            key=key,
            active=slot,
        )
        pid = front.child.pid
        self._scene.events.emit("front.started", pid=pid, listen=config.listen)
        self.keep(front)

    async def renew(self, certificates: Certificates) -> bool:
        """Give the front other certificates; `False` if only another front can have them.

        Raises: DataError, NotReadyError; then the old ones are still shown.
        """
        front = self.front
        if front is None:
            return True
        certificates.check()
        if not certificates.fit_a_command():
            return False
        await front.renew(certificates)
        self._scene.events.emit(
            "front.certificates_renewed",
            source=", ".join(certificates.sources),
            sha256=front.certificate_sha256[:16],
        )
        return True

    def keep(self, front: Front) -> None:
        """Read and watch one that runs."""
        self.front = front
        self._scene.read(front, "front.said")
        self._scene.nursery.start_soon(self._watch, front)

    async def _watch(self, front: Front) -> None:
        status = await front.child.wait()
        with self._scene.standstill.running("the end of the front"):
            await front.silent.wait()
        if self.front is not front:
            return
        self.front = None
        front.close()
        self._scene.restarts += 1
        self._scene.failures.add(exited_error("the front", status, front.lines))
        self._scene.changes.ring()

    async def forget(self, slot: str) -> None:
        """Let clients of an active slot have UNAVAILABLE at once; the front may be ending, too."""
        if self.front is None or self.front.active != slot:
            return
        try:
            await self.front.forget(slot)
        except NotReadyError as exc:
            self._scene.events.emit(
                "front.not_told", level="warning", error=exc.message
            )

    async def stop(self, drain_s: float) -> None:
        """Let open streams end within `drain_s`, then end the front; the sockets stay."""
        front, self.front = self.front, None
        if front is None:
            return
        with trio.CancelScope(shield=True):
            await front.stop(drain_s)
        self._scene.events.emit("front.stopped")

    def close(self) -> None:
        """Close the sockets; harmless when repeated."""
        self._grpc.close()
        self._rest.close()

    def hand_over(self) -> tuple[HandedListener | None, HandedListener | None]:
        """Return the sockets for gRPC and REST."""
        return self._grpc.hand_over(), self._rest.hand_over()

    def adopt(self, grpc: HandedListener | None, rest: HandedListener | None) -> None:
        """Take the sockets of the program before this one."""
        self._grpc, self._rest = Listener(grpc), Listener(rest)
