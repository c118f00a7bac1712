"""Serving: one model server for all mounted volumes, and the front, kept running.

A reconciler of its own: it observes the children, asks `core.plan.plan_serving`, does one action.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable

import trio

from tdxd.core import plan
from tdxd.core.config import Config, ServingConfig
from tdxd.core.plan import Failure, ServerSeen, ServingGoal, ServingSeen, ServingState
from tdxd.errors import NotReadyError, ServerExitedError, TdxdError
from tdxd.guest import front as fronts
from tdxd.guest.changes import Changes
from tdxd.guest.events import Events
from tdxd.guest.front import Front
from tdxd.guest.server import ModelServer, ServedVolume, models_key, start_server
from tdxd.host import clock
from tdxd.host.ports import Child, Host

__all__ = ["ServingReconciler"]

_POLL_S = 2.0
_READY_POLL_S = 0.2
_DRAIN_POLL_S = 0.2
_STOP_S = 5.0
_BACKOFF_MAX_S = 30.0
_STEADY_S = 60.0
"""A server that ran this long has proved itself: the next failure counts as the first."""


class ServingReconciler:
    """Keeps the model server and the front as the mounted volumes and the config want them."""

    def __init__(
        self,
        *,
        host: Host,
        config: Config,
        changes: Changes,
        events: Events,
        volumes: Callable[[], tuple[ServedVolume, ...] | None],
        nursery: trio.Nursery,
    ) -> None:
        self.config = config
        self.stopping = False
        self.state = ServingState.STOPPED
        self.since = clock.wall_clock()
        self.failure: Failure | None = None
        self.servers: dict[str, ModelServer] = {}
        self.front: Front | None = None
        self.restarts = 0
        self.beat_s = trio.current_time()
        self._host, self._changes, self._events = host, changes, events
        self._volumes = volumes
        self._nursery = nursery
        self._listener: tuple[str, socket.socket] | None = None
        self._wanted: tuple[ServedVolume, ...] = ()

    # --- what others see and ask ---

    def uses(self, volume_id: str, generation: int | None) -> bool:
        """Say whether a model server was started on this volume and has not ended."""
        return any(
            (one.volume_id, one.generation) == (volume_id, generation)
            for server in self.servers.values()
            for one in server.volumes
        )

    def retry_now(self) -> None:
        """Forget the last failure and its wait."""
        self.failure = None
        self._changes.ring()

    @property
    def settled(self) -> bool:
        """Whether it rests, planned anew from what is wanted and seen now."""
        return isinstance(self._plan(trio.current_time()).action, plan.Wait)

    # --- the loop ---

    async def run(self) -> None:
        """Observe, plan, act, until `stopping` and nothing runs."""
        while True:
            count, now_s = self._changes.count, trio.current_time()
            self.beat_s = now_s
            step = self._plan(now_s)
            self._show(step.state)
            if not isinstance(step.action, plan.Wait):
                await self._act(step.action)
                continue
            if self.stopping and step.state is ServingState.STOPPED:
                self._close_listener()
                return
            limit_s = now_s + _POLL_S
            await self._changes.after(
                count, min(limit_s, step.action.until_s or limit_s)
            )

    def _plan(self, now_s: float) -> plan.ServingPlan:
        return plan.plan_serving(self._goal(), self._observe(), now_s)

    def _goal(self) -> ServingGoal | None:
        """Decide what should run; while volumes are still being opened, no more than runs now."""
        config = self.config.serving
        if config is None or self.stopping:
            self._wanted = ()
            return None
        settled = self._volumes()
        if settled is not None:
            self._wanted = settled
        if not self._wanted:
            return None
        return ServingGoal(
            models_key=models_key(self._wanted, config),
            front_key=self._front_key(config),
        )

    def _front_key(self, config: ServingConfig) -> str:
        tls = [one for one in self._wanted if one.volume_id == self.config.tls_volume]
        names = [f"{one.volume_id}@{one.generation}" for one in tls]
        text = json.dumps([config.listen, config.user, config.haproxy, names])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _observe(self) -> ServingSeen:
        servers = tuple(
            ServerSeen(
                slot=one.slot, models_key=one.key, ready=one.ready, drained=one.drained
            )
            for one in self.servers.values()
        )
        return ServingSeen(
            servers=servers,
            front_key=self.front.key if self.front else None,
            active=self.front.active if self.front else None,
            failure=self.failure,
        )

    def _show(self, state: ServingState) -> None:
        if state is not self.state:
            self.state, self.since = state, clock.wall_clock()
            level = "info" if self.failure is None else "warning"
            self._events.emit(f"serving.{state.value}", level=level)
            self._changes.ring()

    async def _act(self, action: plan.ServingAction) -> None:
        try:
            await self._do(action)
        except TdxdError as exc:
            self._fail(exc)
            slot = getattr(action, "slot", None)
            if isinstance(action, plan.PollReady) and slot in self.servers:
                await self._stop_server(slot)
        self._changes.ring()

    async def _do(self, action: plan.ServingAction) -> None:
        match action:
            case plan.StartServer(slot):
                await self._start_server(slot)
            case plan.PollReady(slot):
                await self._poll_ready(slot)
            case plan.StartFront(slot):
                self._start_front(slot)
            case plan.SwitchFront(slot):
                assert self.front is not None
                await self.front.switch(slot)
                self._events.emit("serving.switched", slot=slot)
            case plan.DrainServer(slot):
                await self._drain(slot)
            case plan.StopServer(slot):
                await self._stop_server(slot)
            case plan.StopFront():
                await self._stop_front()

    def _fail(self, error: TdxdError) -> None:
        now_s = trio.current_time()
        attempts = self.failure.attempts + 1 if self.failure else 1
        pause_s = plan.backoff_s(
            attempts, ceiling_s=_BACKOFF_MAX_S, jitter=clock.jitter()
        )
        self.failure = Failure(
            error=error, attempts=attempts, since_s=now_s, until_s=now_s + pause_s
        )
        self._events.emit(
            "serving.failed",
            level="warning",
            code=error.code,
            error=error.message,
            hint=error.hint,
            attempts=attempts,
        )

    # --- the model server ---

    async def _start_server(self, slot: str) -> None:
        config = self.config.serving
        assert config is not None
        server = start_server(
            host=self._host,
            config=config,
            runtime_dir=self.config.control.runtime_dir,
            slot=slot,
            volumes=self._wanted,
        )
        self.servers[slot] = server
        self._events.emit("server.started", slot=slot, pid=server.child.pid)
        self._nursery.start_soon(self._read_lines, server)
        self._nursery.start_soon(self._watch_server, server)

    async def _read_lines(self, server: ModelServer) -> None:
        async for line in server.child.lines():
            server.lines.append(line)
            self._events.emit("server.said", level="debug", slot=server.slot, line=line)

    async def _watch_server(self, server: ModelServer) -> None:
        status = await server.child.wait()
        if server.leaving:
            return  # we ended it ourselves
        del self.servers[server.slot]
        server.close()
        if trio.current_time() - server.started_s > _STEADY_S:
            self.failure = None
        self.restarts += 1
        self._fail(_exited("the model server", status, list(server.lines)))
        if self.front is not None and self.front.active == server.slot:
            await self._forget_in_front(server.slot)
        self._changes.ring()

    async def _forget_in_front(self, slot: str) -> None:
        """Let clients have UNAVAILABLE at once; the front may just be ending, too."""
        assert self.front is not None
        try:
            await self.front.forget(slot)
        except NotReadyError as exc:
            self._events.emit("front.not_told", level="warning", error=exc.message)

    async def _poll_ready(self, slot: str) -> None:
        config, server = self.config.serving, self.servers.get(slot)
        if config is None or server is None:
            return
        await server.poll()
        if server.ready:
            took_s = trio.current_time() - server.started_s
            self._events.emit("server.ready", slot=slot, seconds=round(took_s, 3))
            return
        if trio.current_time() > server.started_s + config.ready_timeout_s:
            last = server.lines[-1] if server.lines else "nothing"
            raise NotReadyError(
                f"models not available after {config.ready_timeout_s:g} s; "
                f"the model server said last: {last}",
                hint="raise serving.ready_timeout_s if the model is large",
            )
        await self._changes.after(
            self._changes.count, trio.current_time() + _READY_POLL_S
        )

    async def _drain(self, slot: str) -> None:
        config, server = self.config.serving, self.servers.get(slot)
        if config is None or server is None or self.front is None:
            return
        now_s = trio.current_time()
        if server.drain_until_s is None:
            server.drain_until_s = now_s + config.drain_timeout_s
        if await self.front.streams(slot) == 0 or now_s > server.drain_until_s:
            server.drained = True
            return
        await trio.sleep(_DRAIN_POLL_S)

    async def _stop_server(self, slot: str) -> None:
        server = self.servers.get(slot)
        if server is None:
            return
        server.leaving = True
        with trio.CancelScope(shield=True):
            await server.child.stop(_STOP_S)
        server.close()
        del self.servers[slot]  # only now: its volumes are in use until it has ended
        self._events.emit("server.stopped", slot=slot)

    # --- the front ---

    def _start_front(self, slot: str) -> None:
        config = self.config.serving
        assert config is not None
        mount_points = {one.volume_id: one.mount_point for one in self._wanted}
        certificate = fronts.certificate_of(self.config.tls_volume, mount_points)
        self.front = fronts.start_front(
            host=self._host,
            config=config,
            runtime_dir=self.config.control.runtime_dir,
            listener=self._open_listener(config),
            certificate=certificate,
            key=self._front_key(config),
            active=slot,
        )
        self._events.emit(
            "front.started", pid=self.front.child.pid, listen=config.listen
        )
        self._nursery.start_soon(self._watch_front, self.front)

    def _open_listener(self, config: ServingConfig) -> socket.socket:
        """Return the listener; it outlives the front, so that no queued connection is lost."""
        if self._listener is None or self._listener[0] != config.listen:
            self._close_listener()
            self._listener = (
                config.listen,
                fronts.listen_tcp(fronts.listen_address(config)),
            )
        return self._listener[1]

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._listener[1].close()
            self._listener = None

    async def _watch_front(self, front: Front) -> None:
        lines: list[str] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_front, front.child, lines)
            status = await front.child.wait()
        if self.front is not front:
            return
        self.front = None
        self.restarts += 1
        self._fail(_exited("the front", status, lines))
        self._changes.ring()

    async def _read_front(self, child: Child, lines: list[str]) -> None:
        async for line in child.lines():
            lines.append(line)
            del lines[:-10]
            self._events.emit("front.said", level="debug", line=line)

    async def _stop_front(self) -> None:
        front, self.front = self.front, None
        if front is None:
            return
        config = self.config.serving
        with trio.CancelScope(shield=True):
            await front.stop(config.drain_timeout_s if config else 0)
        self._events.emit("front.stopped")
        if self.stopping or config is None:
            self._close_listener()

    # --- the end ---

    async def close(self) -> None:
        """End whatever runs, front first; for the daemon's last clean-up."""
        await self._stop_front()
        for slot in list(self.servers):
            await self._stop_server(slot)
        self._close_listener()


def _exited(what: str, status: int, lines: list[str]) -> ServerExitedError:
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    last = next((line for line in reversed(lines) if line.strip()), "nothing")
    text = f"{what} ended {how}; it said last: {last[:300]}"
    return ServerExitedError(text, hint="its output: tdxctl events")
