"""Serving: one model server for all mounted volumes, and the front, kept running.

A reconciler of its own: it observes the children, asks `core.plan.plan_serving`, does one action.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import trio

from tdxd.core import plan
from tdxd.core.config import Config, ServingConfig
from tdxd.core.plan import Failure, ServerSeen, ServingGoal, ServingSeen, ServingState
from tdxd.errors import HostError, TdxdError
from tdxd.guest.changes import Changes
from tdxd.guest.events import Events
from tdxd.guest.failures import Failures
from tdxd.guest.front import Front, adopt_front, front_key
from tdxd.guest.front_door import FrontDoor
from tdxd.guest.front_start import certificates_of
from tdxd.guest.handover import HandedServing, ServedVolume
from tdxd.guest.model_servers import ModelServers
from tdxd.guest.server import ModelServer, adopt_server, models_key
from tdxd.guest.serving_scene import ServingScene
from tdxd.guest.standstill import Standstill
from tdxd.host import clock
from tdxd.host.ports import Host

__all__ = ["ServingReconciler"]

_POLL_S = 2.0
_DRAIN_POLL_S = 0.2
_BACKOFF_MAX_S = 30.0
_DEAD_SOCKET = "dead socket"


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
        self.beat_s = trio.current_time()
        self._scene = ServingScene(
            host=host,
            runtime_dir=config.control.runtime_dir,
            standstill=standstill,
            changes=changes,
            events=events,
            failures=self._failures,
            nursery=nursery,
        )
        self.door = FrontDoor(self._scene)
        self._servers = ModelServers(self._scene, self.door.forget)
        self._host, self._changes, self._events = host, changes, events
        self._standstill = standstill
        self._volumes, self._revoked = volumes, revoked
        self._wanted: tuple[ServedVolume, ...] = ()

    # --- what others see and ask ---

    @property
    def servers(self) -> dict[str, ModelServer]:
        """The model servers by slot."""
        return self._servers.by_slot

    @property
    def front(self) -> Front | None:
        """The front, while there is one."""
        return self.door.front

    @property
    def restarts(self) -> int:
        """How often a child ended by itself."""
        return self._scene.restarts

    @property
    def limits_problem(self) -> str:
        """Why configured limits are not in force, if so."""
        return self._host.children.limits_problem

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
                self.door.close()
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
            front_key=self._front_key(),
            front_revoked=self.config.tls_volume in {name for name, _ in revoked},
            active=self.front.active if self.front else None,
            failure=self.failure,
        )

    def _front_key(self) -> str | None:
        """Return the key of the front that runs; of one on a dead socket, that of none wanted."""
        if self.front is None:
            return None
        return self.front.key if self.door.sound else _DEAD_SOCKET

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
                await self._servers.stop(slot)
        if action != self._plan(trio.current_time()).action:
            self._changes.ring()  # polling alone is no news

    async def _do(self, action: plan.ServingAction) -> None:
        match action:
            case plan.StartServer(slot):
                await self._servers.start(slot, self._config(), self._wanted)
            case plan.PollReady(slot):
                await self._servers.poll_ready(slot, self._config())
            case plan.StartFront(slot):
                await self._start_front(slot)
            case plan.SwitchFront(slot):
                assert self.front is not None
                await self.front.switch(slot)
                self._events.emit("serving.switched", slot=slot)
            case plan.DrainServer(slot):
                await self._drain(slot)
            case plan.StopServer(slot):
                await self._servers.stop(slot)
            case plan.StopFront():
                await self._stop_front()

    def _config(self) -> ServingConfig:
        config = self.config.serving
        assert config is not None, "without it nothing is planned but an end"
        return config

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

    async def _start_front(self, slot: str) -> None:
        config = self._config()
        mount_points = {one.volume_id: one.mount_point for one in self._wanted}
        tls_volume = self.config.tls_volume
        await self.door.start(
            slot,
            config,
            certificates_of(tls_volume, mount_points, config),
            front_key(self._wanted, config, tls_volume),
        )

    async def _stop_front(self) -> None:
        if self.front is None:
            return
        config, seen = self.config.serving, self._observe()
        drains = config and self.door.sound and not seen.front_revoked
        if not self.door.sound:
            self._events.emit("front.socket_dead", level="warning")
        drain_s = config.drain_timeout_s if config and drains else 0.0
        self.beat_s = trio.current_time() + drain_s
        await self.door.stop(drain_s)
        if self.stopping or config is None:
            self.door.close()

    # --- over an exec ---

    def hand_over(self) -> HandedServing:
        """Return what the program after this one needs; call it at standstill."""
        listener, rest_listener = self.door.hand_over()
        return HandedServing(
            state=self.state.value,
            since=self.since,
            restarts=self.restarts,
            wanted=self._wanted,
            servers=tuple(one.hand_over(self._host) for one in self.servers.values()),
            front=self.front.hand_over(self._host) if self.front else None,
            listener=listener,
            rest_listener=rest_listener,
        )

    def adopt(self, handed: HandedServing) -> None:
        """Go on with the children of the program before this one; call it before `run`."""
        self.state, self.since = ServingState(handed.state), handed.since
        self._scene.restarts, self._wanted = handed.restarts, handed.wanted
        self.door.adopt(handed.listener, handed.rest_listener)
        for server in handed.servers:
            with self._not_adopted(server.child.name):
                self._servers.keep(adopt_server(server, self._host))
        if handed.front is not None:
            with self._not_adopted("front"):
                self.door.keep(adopt_front(handed.front, self._host))

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
            await self._servers.stop(slot)
        self.door.close()
