"""Serving: one model server for all mounted volumes, and the front, kept running.

A reconciler of its own: it observes the children, asks `core.plan.plan_serving`, does one action.
"""

from __future__ import annotations

from functools import partial

import trio

from tdxd.core import plan
from tdxd.core.config import Config, ServingConfig
from tdxd.core.plan import Failure, ServerSeen, ServingGoal, ServingSeen, ServingState
from tdxd.errors import TdxdError
from tdxd.guest.certificates import Secrets, certificates_key
from tdxd.guest.changes import Changes
from tdxd.guest.events import Events
from tdxd.guest.failures import error_fields
from tdxd.guest.front import Front, adopt_front, front_key
from tdxd.guest.front_certificates import FrontCertificates
from tdxd.guest.front_door import FrontDoor
from tdxd.guest.handover import HandedServing, ServedVolume
from tdxd.guest.model_servers import ModelServers
from tdxd.guest.server import ModelServer, adopt_server, models_key
from tdxd.guest.serving_memory import check_room
from tdxd.guest.serving_scene import OpenVolumes, ServingScene, failures_of_serving
from tdxd.guest.standstill import Standstill
from tdxd.host import clock
from tdxd.host.ports import Host

__all__ = ["ServingReconciler"]

_POLL_S = 2.0
_DRAIN_POLL_S = 0.2
_DEAD_SOCKET = "dead socket"
_Volumes = tuple[ServedVolume, ...]


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
        volumes: OpenVolumes,
        nursery: trio.Nursery,
        secrets: Secrets | None = None,
    ) -> None:
        self.config, self.stopping = config, False
        self.state, self.since = ServingState.STOPPED, clock.wall_clock()
        self._failures = failures_of_serving(events, "serving.failed")
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
        self._servers = ModelServers(
            self._scene,
            forget=self.door.forget,
            failed=lambda one, error: self._failed(one.volumes, error, ready=one.ready),
        )
        self._certificates = FrontCertificates(
            secrets, events, lambda: (self.config, self._wanted), volumes.revoked
        )
        self._host, self._changes, self._events = host, changes, events
        self._standstill = standstill
        self._volumes = volumes
        self._wanted: _Volumes = ()

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

    @property
    def standing(self) -> Failure | None:
        """The last failure, while it keeps serving from what it should be now."""
        state = self._plan(trio.current_time()).state
        return None if state is ServingState.READY else self.failure

    @property
    def not_renewed(self) -> Failure | None:
        """What keeps the front from showing the certificates that it should."""
        return self._certificates.failure if self.front else None

    def uses(self, volume_id: str, generation: int | None) -> bool:
        """Say whether a model server was started on this volume and has not ended."""
        wanted = frozenset([(volume_id, generation)])
        return any(server.sees_any(wanted) for server in self.servers.values())

    @property
    def serving(self) -> bool:
        """Whether the front routes to a server that is ready, whatever else goes on."""
        return self._active() is not None

    def serves(self, volume_id: str, generation: int | None) -> bool:
        """Say whether the server that the front routes to is ready and was started on this."""
        wanted, server = frozenset([(volume_id, generation)]), self._active()
        return server is not None and server.sees_any(wanted)

    def _active(self) -> ModelServer | None:
        slot = None if self.front is None else self.front.active
        server = None if slot is None else self.servers.get(slot)
        return server if server is not None and server.ready else None

    def retry_now(self) -> None:
        """Forget the last failures and their waits."""
        self._failures.forget()
        self._certificates.forget()
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
            ends = self.stopping or self.config.serving is None
            self._certificates.forget_proven(ends=ends)
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
        settled = self._volumes.served()
        if settled is not None:
            self._wanted = settled
        makes_way = self._volumes.replacing
        if not self._wanted and not makes_way:
            return None
        return ServingGoal(
            models_key=None if makes_way else models_key(self._wanted, config),
            front_key=front_key(config, supplied=self._certificates.supplied),
            certificates_key=self._certificates.key,
            in_place=config.strategy == "replace-in-place",
        )

    def _observe(self) -> ServingSeen:
        revoked, front = self._volumes.revoked(), self.front
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
            front_revoked=front is not None
            and self._certificates.revoked(front.sources),
            active=front.active if front else None,
            failure=self.failure,
            certificates_key=certificates_key(front.sources) if front else None,
            not_renewed=self.not_renewed,
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
        wanted = self._wanted
        try:
            await self._do(action)
        except TdxdError as exc:
            await self._failed_at(action, exc, wanted)
        if action != self._plan(trio.current_time()).action:
            self._changes.ring()  # polling alone is no news

    async def _failed_at(
        self, action: plan.ServingAction, error: TdxdError, wanted: _Volumes
    ) -> None:
        match action:
            case plan.StartServer():
                self._failed(wanted, error, ready=False)
            case plan.PollReady(slot) if slot in self.servers:
                volumes = self.servers[slot].volumes
                await self._servers.stop(slot)
                self._failed(volumes, error, ready=False)
            case plan.RenewCertificates():
                self._certificates.failed(error)
            case _:
                self._failures.add(error)

    def _failed(self, volumes: _Volumes, error: TdxdError, *, ready: bool) -> None:
        """Keep a failure, unless a new generation takes the blame of a server never ready.

        If other volumes are wanted by now, it is nobody's.
        """
        self._goal()
        if not ready and volumes != self._wanted:
            return
        if ready or not self._volumes.refuse(volumes, error):
            self._failures.add(error)
            return
        self._events.emit(
            "serving.generation_refused", level="warning", **error_fields(error)
        )
        active = self._active()  # until there is word of other volumes
        self._wanted = active.volumes if active is not None else ()

    async def _do(self, action: plan.ServingAction) -> None:
        match action:
            case plan.StartServer(slot):
                config, wanted = self._config(), self._wanted  # as it was planned
                if self.servers:
                    await check_room(self._host, self.servers.values())
                await self._servers.start(slot, config, wanted)
            case plan.PollReady(slot):
                await self._servers.poll_ready(slot, self._config())
            case plan.StartFront(slot):
                await self._start_front(slot)
            case plan.SwitchFront(slot):
                await self._switch(slot)
            case plan.RenewCertificates():
                await self._renew()
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

    async def _switch(self, slot: str) -> None:
        assert self.front is not None, "it was seen"
        await self.front.switch(slot)
        if (server := self.servers.get(slot)) is not None:
            server.drained, server.drain_until_s = False, None
        self._events.emit("serving.switched", slot=slot)

    async def _drain(self, slot: str) -> None:
        config, server, front = self._config(), self.servers.get(slot), self.front
        if server is None:
            return
        now_s = trio.current_time()
        if front is not None and front.active == slot:
            # It is replaced in place: not for one that is known not to start.
            try:
                await self._servers.check(config, self._wanted)
            except TdxdError as exc:
                self._failed(self._wanted, exc, ready=False)
                return
            self._events.emit("serving.replacing", slot=slot)
            await self.door.forget(slot)
        if server.drain_until_s is None:
            server.drain_until_s = now_s + config.drain_timeout_s
        late = now_s > server.drain_until_s
        if front is None or late or await front.streams(slot) == 0:
            server.drained = True
            return
        await trio.sleep(_DRAIN_POLL_S)

    async def _renew(self) -> None:
        """Change certificates in the running front, or end it where only another can have them."""
        certificates = await self._certificates.read()
        if await self.door.renew(certificates):
            self._certificates.proven = certificates
        else:
            await self._stop_front()
        self._certificates.forget()

    async def _start_front(self, slot: str) -> None:
        config = self._config()
        key = front_key(config, supplied=self._certificates.supplied)
        await self._certificates.start(partial(self.door.start, slot, config, key))

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
            with self._scene.adopting(server.child.name):
                self._servers.keep(adopt_server(server, self._host))
        if handed.front is not None:
            with self._scene.adopting("front"):
                self.door.keep(adopt_front(handed.front, self._host))

    # --- the end ---

    async def close(self) -> None:
        """End whatever runs, front first; for the daemon's last clean-up."""
        await self._stop_front()
        for slot in list(self.servers):
            await self._servers.stop(slot)
        self.door.close()
