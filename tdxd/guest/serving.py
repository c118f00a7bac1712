"""Serving: one model server for all mounted volumes, and the front, kept running.

A reconciler of its own: it observes the children, asks `core.plan.plan_serving`, does one action.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import trio

from tdxd.core import plan
from tdxd.core.config import Config
from tdxd.core.plan import Failure, ServerSeen, ServingGoal, ServingSeen, ServingState
from tdxd.errors import HostError, NotReadyError, TdxdError
from tdxd.guest.changes import Changes
from tdxd.guest.events import Events
from tdxd.guest.failures import Failures
from tdxd.guest.front import (
    Front,
    adopt_front,
    certificate_of,
    front_key,
    start_front,
)
from tdxd.guest.handover import HandedServing, ServedVolume
from tdxd.guest.listener import Listener
from tdxd.guest.server import (
    ModelServer,
    adopt_server,
    exited_error,
    models_key,
    start_server,
)
from tdxd.guest.standstill import Standstill
from tdxd.host import clock
from tdxd.host.ports import Host

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
        standstill: Standstill,
        changes: Changes,
        events: Events,
        volumes: Callable[[], tuple[ServedVolume, ...] | None],
        revoked: Callable[[], frozenset[tuple[str, int | None]]],
        nursery: trio.Nursery,
    ) -> None:
        self.config = config
        self.stopping = False
        self.state = ServingState.STOPPED
        self.since = clock.wall_clock()
        self._failures = Failures(
            backoff_max_s=_BACKOFF_MAX_S,
            slow_s=_BACKOFF_MAX_S,
            events=events,
            event="serving.failed",
        )
        self.servers: dict[str, ModelServer] = {}
        self.front: Front | None = None
        self.restarts = 0
        self.beat_s = trio.current_time()
        self._host, self._changes, self._events = host, changes, events
        self._standstill = standstill
        self._volumes, self._revoked = volumes, revoked
        self._nursery = nursery
        self._listener = Listener()
        """Outlives the front, so that no queued connection is lost."""
        self._wanted: tuple[ServedVolume, ...] = ()

    # --- what others see and ask ---

    @property
    def failure(self) -> Failure | None:
        """The last failure, until a server has proved itself or it is forgotten."""
        return self._failures.last

    def uses(self, volume_id: str, generation: int | None) -> bool:
        """Say whether a model server was started on this volume and has not ended."""
        wanted = frozenset([(volume_id, generation)])
        return any(server.sees_any(wanted) for server in self.servers.values())

    def retry_now(self) -> None:
        """Forget the last failure and its wait."""
        self._failures.forget()
        self._changes.ring()

    @property
    def settled(self) -> bool:
        """Whether it rests, planned anew from what is wanted and seen now."""
        return isinstance(self._plan(trio.current_time()).action, plan.Wait)

    # --- the loop ---

    async def run(self) -> None:
        """Observe, plan, act, until `stopping` and nothing runs."""
        while True:
            await self._standstill.passage()
            count, now_s = self._changes.count, trio.current_time()
            self.beat_s = now_s
            step = self._plan(now_s)
            self._show(step.state)
            if not isinstance(step.action, plan.Wait):
                with self._standstill.running("serving"):
                    await self._act(step.action)
                continue
            if self.stopping and step.state is ServingState.STOPPED:
                self._listener.close()
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
            front_key=front_key(self._wanted, config, self.config.tls_volume),
        )

    def _observe(self) -> ServingSeen:
        revoked = self._revoked()
        servers = tuple(
            ServerSeen(
                slot=one.slot,
                models_key=one.key,
                ready=one.ready,
                drained=one.drained,
                revoked=one.sees_any(revoked),
            )
            for one in self.servers.values()
        )
        return ServingSeen(
            servers=servers,
            front_key=self.front.key if self.front else None,
            front_revoked=self.config.tls_volume in {name for name, _ in revoked},
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
            self._failures.add(exc)
            slot = getattr(action, "slot", None)
            if isinstance(action, plan.PollReady) and slot in self.servers:
                await self._stop_server(slot)
        if action != self._plan(trio.current_time()).action:
            self._changes.ring()  # polling alone is no news

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
        self._events.emit("server.started", slot=slot, pid=server.child.pid)
        self._keep_server(server)

    def _keep_server(self, server: ModelServer) -> None:
        self.servers[server.slot] = server
        said = partial(self._read, server, "server.said", slot=server.slot)
        self._nursery.start_soon(said)
        self._nursery.start_soon(self._watch_server, server)

    async def _read(
        self, child: ModelServer | Front, event: str, **fields: str
    ) -> None:
        async for line in child.child.lines():
            child.lines.append(line)
            self._events.emit(event, level="debug", **fields, line=line)
        child.silent.set()

    async def _watch_server(self, server: ModelServer) -> None:
        status = await server.child.wait()
        if server.leaving:
            return  # we ended it ourselves
        del self.servers[server.slot]
        server.close()
        if trio.current_time() - server.started_s > _STEADY_S:
            self._failures.forget()
        self.restarts += 1
        self._failures.add(exited_error("the model server", status, server.lines))
        if self.front is not None and self.front.active == server.slot:
            with self._standstill.running("the end of a model server"):
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
        if self.front is not None and self.front.active == slot:
            await self._forget_in_front(slot)
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
        certificate = certificate_of(self.config.tls_volume, mount_points)
        front = start_front(
            host=self._host,
            config=config,
            runtime_dir=self.config.control.runtime_dir,
            listener=self._listener.at(config.listen),
            certificate=certificate,
            key=front_key(self._wanted, config, self.config.tls_volume),
            active=slot,
        )
        self._events.emit("front.started", pid=front.child.pid, listen=config.listen)
        self._keep_front(front)

    def _keep_front(self, front: Front) -> None:
        self.front = front
        self._nursery.start_soon(self._read, front, "front.said")
        self._nursery.start_soon(self._watch_front, front)

    async def _watch_front(self, front: Front) -> None:
        status = await front.child.wait()
        with self._standstill.running("the end of the front"):
            await front.silent.wait()
        if self.front is not front:
            return
        self.front = None
        front.close()
        self.restarts += 1
        self._failures.add(exited_error("the front", status, front.lines))
        self._changes.ring()

    async def _stop_front(self) -> None:
        front, self.front = self.front, None
        if front is None:
            return
        config = self.config.serving
        drains = config and not self._observe().front_revoked
        drain_s = config.drain_timeout_s if config and drains else 0.0
        self.beat_s = trio.current_time() + drain_s
        with trio.CancelScope(shield=True):
            await front.stop(drain_s)
        self._events.emit("front.stopped")
        if self.stopping or config is None:
            self._listener.close()

    # --- over an exec ---

    def hand_over(self) -> HandedServing:
        """Return what the program after this one needs; call it at standstill."""
        return HandedServing(
            state=self.state.value,
            since=self.since,
            restarts=self.restarts,
            wanted=self._wanted,
            servers=tuple(one.hand_over(self._host) for one in self.servers.values()),
            front=self.front.hand_over(self._host) if self.front else None,
            listener=self._listener.hand_over(),
        )

    def adopt(self, handed: HandedServing) -> None:
        """Go on with the children of the program before this one; call it before `run`."""
        self.state, self.since = ServingState(handed.state), handed.since
        self.restarts, self._wanted = handed.restarts, handed.wanted
        self._listener = Listener(handed.listener)
        for server in handed.servers:
            with self._not_adopted(server.child.name):
                self._keep_server(adopt_server(server, self._host))
        if handed.front is not None:
            with self._not_adopted("front"):
                self._keep_front(adopt_front(handed.front, self._host))

    @contextlib.contextmanager
    def _not_adopted(self, name: str) -> Iterator[None]:
        """Go on without a child that is none of ours any more: another one is started."""
        try:
            yield
        except HostError as exc:
            self._events.emit(
                "child.not_adopted", level="warning", child=name, error=exc.message
            )

    # --- the end ---

    async def close(self) -> None:
        """End whatever runs, front first; for the daemon's last clean-up."""
        await self._stop_front()
        for slot in list(self.servers):
            await self._stop_server(slot)
        self._listener.close()
