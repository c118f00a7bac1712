"""The model servers: one serves, another one may be on its way in or out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from tdxd.core.server_flags import check_flags
from tdxd.core.serving_config import ServingConfig
from tdxd.errors import NotReadyError, TdxdError
from tdxd.guest.handover import ServedVolume
from tdxd.guest.server import ModelServer, exited_error
from tdxd.guest.server_program import ServerProgram, ServerPrograms
from tdxd.guest.server_start import check_models, offered_by, start_server
from tdxd.guest.serving_scene import ServingScene

__all__ = ["ModelServers"]

_READY_POLL_S = 0.2
_STOP_S = 5.0
_STEADY_S = 60.0
"""A server that ran this long has proved itself: the next failure counts as the first."""


class ModelServers:
    """Starts, awaits and ends them.

    `forget` tells the front that a slot is gone; `failed` is told of one that ended by itself.
    """

    def __init__(
        self,
        scene: ServingScene,
        *,
        forget: Callable[[str], Awaitable[None]],
        failed: Callable[[ModelServer, TdxdError], None],
    ) -> None:
        self.by_slot: dict[str, ModelServer] = {}
        self._failed = failed
        self._scene = scene
        self._forget = forget
        self._programs = ServerPrograms(scene.host, scene.runtime_dir)

    async def start(
        self, slot: str, config: ServingConfig, volumes: tuple[ServedVolume, ...]
    ) -> None:
        """Start one for these volumes.

        Raises: ConfigError, ServeError, NotReadyError, StalledError, HostError.
        """
        program = await self._program(config)
        offered = await offered_by(volumes, self._scene.reader)
        server = start_server(
            host=self._scene.host,
            config=config,
            program=program,
            runtime_dir=self._scene.runtime_dir,
            slot=slot,
            offered=offered,
        )
        self._scene.events.emit(
            "server.started",
            slot=slot,
            pid=server.child.pid,
            program=str(program.version),
        )
        self.keep(server)
        self._warn_of_strangers(config, server)

    async def check(
        self, config: ServingConfig, volumes: tuple[ServedVolume, ...]
    ) -> None:
        """Check as far as it can be known whether one for these volumes would start.

        Raises: ConfigError, ServeError, NotReadyError, StalledError, HostError.
        """
        await self._program(config)
        check_models(await offered_by(volumes, self._scene.reader))

    async def _program(self, config: ServingConfig) -> ServerProgram:
        program = await self._programs.choose(config)
        check_flags(config.extra_flags, program.version)
        return program

    def _warn_of_strangers(self, config: ServingConfig, server: ModelServer) -> None:
        there = {model.name for model in server.models}
        for one in config.model:
            if one.name not in there:
                self._scene.events.emit(
                    "serving.model_unknown", level="warning", model=one.name
                )

    def keep(self, server: ModelServer) -> None:
        """Read and watch one that runs."""
        self.by_slot[server.slot] = server
        self._scene.read(server, "server.said", slot=server.slot)
        self._scene.nursery.start_soon(self._watch, server)

    async def _watch(self, server: ModelServer) -> None:
        status = await server.child.wait()
        if server.leaving:
            return  # we ended it ourselves
        del self.by_slot[server.slot]
        server.close()
        scene = self._scene
        if trio.current_time() - server.started_s > _STEADY_S:
            scene.failures.forget()
        scene.restarts += 1
        self._failed(server, exited_error("the model server", status, server.lines))
        with scene.standstill.running("the end of a model server"):
            await self._forget(server.slot)
        scene.changes.ring()

    async def poll_ready(self, slot: str, config: ServingConfig) -> None:
        """Ask whether all models are available; wait a moment if they are not.

        Raises: NotReadyError if one failed, or it takes too long.
        """
        server = self.by_slot.get(slot)
        if server is None:
            return
        await server.poll()
        now_s = trio.current_time()
        if server.ready:
            took_s = round(now_s - server.started_s, 3)
            self._scene.events.emit("server.ready", slot=slot, seconds=took_s)
            return
        if now_s > server.started_s + config.ready_timeout_s:
            last = server.lines[-1] if server.lines else "nothing"
            raise NotReadyError(
                f"models not available after {config.ready_timeout_s:g} s; "
                f"the model server said last: {last}",
                hint="raise serving.ready_timeout_s if the model is large",
            )
        changes = self._scene.changes
        await changes.after(changes.count, now_s + _READY_POLL_S)

    async def stop(self, slot: str) -> None:
        """End one; its volumes are in use until it has ended."""
        server = self.by_slot.get(slot)
        if server is None:
            return
        server.leaving = True
        await self._forget(slot)
        with trio.CancelScope(shield=True):
            await server.child.stop(_STOP_S)
        server.close()
        del self.by_slot[slot]
        self._scene.events.emit("server.stopped", slot=slot)
