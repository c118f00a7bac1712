"""Serving: the model servers and the front, and the table of their states."""

from __future__ import annotations

import dataclasses
import enum

from tdxd.core.plan.failure import Failure, Wait
from tdxd.errors import Retry

__all__ = [
    "SLOTS",
    "DrainServer",
    "PollReady",
    "RenewCertificates",
    "ServerSeen",
    "ServingAction",
    "ServingGoal",
    "ServingPlan",
    "ServingSeen",
    "ServingState",
    "StartFront",
    "StartServer",
    "StopFront",
    "StopServer",
    "SwitchFront",
    "plan_serving",
]


class ServingState(enum.Enum):
    """What serving is doing, as `status` shows it."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    BACKOFF = "backoff"
    FAILED = "failed"


@dataclasses.dataclass(frozen=True, slots=True)
class StartServer:
    """Start a model server for the goal in this slot of the front."""

    slot: str


@dataclasses.dataclass(frozen=True, slots=True)
class PollReady:
    """Ask the starting model server for the state of its models."""

    slot: str


@dataclasses.dataclass(frozen=True, slots=True)
class StartFront:
    """Start the front, routing to this slot."""

    slot: str


@dataclasses.dataclass(frozen=True, slots=True)
class SwitchFront:
    """Route new streams to this slot."""

    slot: str


@dataclasses.dataclass(frozen=True, slots=True)
class RenewCertificates:
    """Give the running front the certificates of the goal."""


@dataclasses.dataclass(frozen=True, slots=True)
class DrainServer:
    """Wait until no stream goes to this slot, or its drain time is over.

    If the front still routes to it, tell the front first to send it nothing new.
    """

    slot: str


@dataclasses.dataclass(frozen=True, slots=True)
class StopServer:
    """End the model server in this slot."""

    slot: str


@dataclasses.dataclass(frozen=True, slots=True)
class StopFront:
    """Drain and end the front."""


ServingAction = (
    StartServer
    | PollReady
    | StartFront
    | SwitchFront
    | RenewCertificates
    | DrainServer
    | StopServer
    | StopFront
    | Wait
)

SLOTS = ("a", "b")
"""The front's two fixed server slots: one serves, the other is the next or the last one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServingGoal:
    """What should be served: a key for the set of models, and one for the front's settings.

    `certificates_key` names the front's certificates; `None`: there are none at hand, and a front
    keeps what it has. `in_place`: a model server is replaced after its end, not beside it.
    Without `models_key` the models are on their way, and need the room of those of now.
    """

    models_key: str | None
    front_key: str
    certificates_key: str | None = None
    in_place: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerSeen:
    """A living model server. `drained`: no stream goes to it any more.

    `revoked`: it sees a volume that must be closed now, whoever still calls it.
    """

    slot: str
    models_key: str
    ready: bool = False
    drained: bool = False
    revoked: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServingSeen:
    """What was observed of the children. `front_key` and the like are `None` without a front.

    `front_revoked`: the front's certificate is from a volume that must be closed now. `active` is
    `None`, too, while the front routes to no server. `not_renewed` is what kept the front from
    taking the certificates of the goal.
    """

    servers: tuple[ServerSeen, ...] = ()
    front_key: str | None = None
    front_revoked: bool = False
    active: str | None = None
    failure: Failure | None = None
    certificates_key: str | None = None
    not_renewed: Failure | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class ServingPlan:
    """The state to show and the one thing to do."""

    state: ServingState
    action: ServingAction


def plan_serving(
    goal: ServingGoal | None, seen: ServingSeen, now_s: float
) -> ServingPlan:
    """Decide the next action of serving; `None` as goal means that nothing should run.

    A changed set of models is started beside the old one, the front moves over, the old one
    drains and stops: so no request fails. In place, the old one drains and stops first. Other
    certificates are given to the front as it runs; with other settings it is restarted. What
    holds something of a revoked volume does not wait for any of this.
    """
    if goal is None:
        return _stop_serving(seen)
    if seen.front_key is not None and seen.front_revoked:
        return ServingPlan(ServingState.DRAINING, StopFront())
    server = _matching(goal, seen)
    revoked = next((one for one in seen.servers if one.revoked), None)
    if revoked is not None:
        return ServingPlan(ServingState.DRAINING, _cut_off(revoked, server, seen))
    if goal.models_key is None:
        return _make_way(seen)
    paused = _paused(seen.failure, now_s)
    there = _meanwhile(server, seen) if seen.front_key is None else None
    if there is not None and paused is None:
        return ServingPlan(ServingState.STARTING, StartFront(there.slot))
    if server is None:
        return paused or _make_room(goal, seen)
    if not server.ready:
        return ServingPlan(ServingState.STARTING, PollReady(server.slot))
    if paused is not None and seen.front_key is None:
        return paused
    return _settle(goal, seen, server, now_s)


def _meanwhile(server: ServerSeen | None, seen: ServingSeen) -> ServerSeen | None:
    """Return what a front that is missing can route to now: the goal's server, or another."""
    if server is not None and server.ready:
        return server
    able = (one for one in seen.servers if one.ready and not one.drained)
    return next((one for one in able if not one.revoked), None)


def _cut_off(
    revoked: ServerSeen, server: ServerSeen | None, seen: ServingSeen
) -> SwitchFront | StopServer:
    """Stop a server at once; only one that is ready already takes its callers over."""
    if server is not None and server.ready and seen.active == revoked.slot:
        return SwitchFront(server.slot)
    return StopServer(revoked.slot)


def _make_room(goal: ServingGoal, seen: ServingSeen) -> ServingPlan:
    """Start in a slot that the front does not use, after ending what is in the way."""
    if goal.in_place and seen.servers:
        return _leave(_unused_first(seen))
    spare = [slot for slot in SLOTS if slot != seen.active]
    taken = {one.slot for one in seen.servers}
    free = [slot for slot in spare if slot not in taken]
    action = StartServer(free[0]) if free else StopServer(spare[-1])
    return ServingPlan(ServingState.STARTING, action)


def _make_way(seen: ServingSeen) -> ServingPlan:
    """End every model server; the front stays, and says that there is none."""
    if seen.servers:
        return _leave(_unused_first(seen))
    return ServingPlan(ServingState.STARTING, Wait())


def _unused_first(seen: ServingSeen) -> ServerSeen:
    return min(seen.servers, key=lambda one: one.slot == seen.active)


def _leave(old: ServerSeen) -> ServingPlan:
    """End a server once nobody waits for an answer of it; one that is not ready never has any."""
    ended = old.drained or not old.ready
    action = StopServer(old.slot) if ended else DrainServer(old.slot)
    return ServingPlan(ServingState.DRAINING, action)


def _settle(
    goal: ServingGoal, seen: ServingSeen, server: ServerSeen, now_s: float
) -> ServingPlan:
    """Bring the front to the ready server, then end the other one."""
    if seen.front_key != goal.front_key:
        return ServingPlan(ServingState.DRAINING, StopFront())
    old = next((one for one in seen.servers if one.slot != server.slot), None)
    ready = ServingState.READY if old is None else ServingState.DRAINING
    rest = Wait()
    if goal.certificates_key not in (None, seen.certificates_key):
        pause = _pause(seen.not_renewed, now_s)
        if pause is None:
            return ServingPlan(ready, RenewCertificates())
        rest = pause
    if seen.active != server.slot:
        return ServingPlan(ServingState.DRAINING, SwitchFront(server.slot))
    return ServingPlan(ready, rest) if old is None else _leave(old)


def _matching(goal: ServingGoal, seen: ServingSeen) -> ServerSeen | None:
    """Return the server of the goal's models, the one in use first."""
    same = [
        one
        for one in seen.servers
        if one.models_key == goal.models_key and not one.revoked
    ]
    return next((one for one in same if one.slot == seen.active), None) or next(
        iter(same), None
    )


def _paused(failure: Failure | None, now_s: float) -> ServingPlan | None:
    pause = _pause(failure, now_s)
    if pause is None:
        return None
    final = pause.until_s is None
    return ServingPlan(ServingState.FAILED if final else ServingState.BACKOFF, pause)


def _pause(failure: Failure | None, now_s: float) -> Wait | None:
    """Return how long a failure keeps from the next attempt; `None` if it does not."""
    if failure is None:
        return None
    if failure.error.retry in (Retry.OPERATOR, Retry.NEVER):
        return Wait()
    return Wait(failure.until_s) if now_s < failure.until_s else None


def _stop_serving(seen: ServingSeen) -> ServingPlan:
    if seen.front_key is not None:
        return ServingPlan(ServingState.DRAINING, StopFront())
    if seen.servers:
        return ServingPlan(ServingState.DRAINING, StopServer(seen.servers[0].slot))
    return ServingPlan(ServingState.STOPPED, Wait())
