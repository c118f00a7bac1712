"""Every decision of the reconcilers, as pure functions: what was seen, what to do next.

Level-triggered: a reconciler observes, calls `plan_volume` or `plan_serving`, does the one
action it names, and observes again. States are derived from what was observed, never stored,
so repeating an action or starting over is harmless. Everything that affects a state stands in
this file.

Times are seconds of a monotonic clock.
"""

from __future__ import annotations

import dataclasses
import enum

from tdxd.errors import Retry, TdxdError

__all__ = [
    "Attest",
    "DrainServer",
    "Failure",
    "ForgetKey",
    "Map",
    "Mount",
    "PollReady",
    "ServerSeen",
    "ServingGoal",
    "ServingPlan",
    "ServingSeen",
    "ServingState",
    "StartFront",
    "StartServer",
    "StopFront",
    "StopServer",
    "SwitchFront",
    "Unmap",
    "Unmount",
    "VolumePlan",
    "VolumeSeen",
    "VolumeState",
    "Wait",
    "backoff_s",
    "plan_serving",
    "plan_volume",
]


# --- failures and waiting -----------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The last error, how often in a row, and when the next attempt may start.

    `image_tag` names the file that it concerns: another file makes the failure void.
    """

    error: TdxdError
    attempts: int
    until_s: float
    since_s: float
    image_tag: tuple[int, ...] | None = None


def backoff_s(attempts: int, *, ceiling_s: float, jitter: float) -> float:
    """Return the wait before the next attempt: full-jitter exponential backoff.

    `attempts` counts failures in a row, from 1; `jitter` is uniform in [0, 1). The wait is
    uniform in [0.2 s, min(ceiling, 1 s x 2^attempts)).
    """
    top = min(ceiling_s, 2.0 ** min(attempts, 16))
    return 0.2 + jitter * max(0.0, top - 0.2)


@dataclasses.dataclass(frozen=True, slots=True)
class Wait:
    """Do nothing until something changes, or until a time (`None`: for ever)."""

    until_s: float | None = None


# --- volumes ------------------------------------------------------------------


class VolumeState(enum.Enum):
    """What a volume is doing, as `status` shows it."""

    ABSENT = "absent"
    ATTESTING = "attesting"
    KEYED = "keyed"
    MAPPED = "mapped"
    MOUNTED = "mounted"
    CLOSING = "closing"
    BACKOFF = "backoff"
    DENIED = "denied"
    FAILED = "failed"


@dataclasses.dataclass(frozen=True, slots=True)
class Attest:
    """Ask the key server for the bundle."""


@dataclasses.dataclass(frozen=True, slots=True)
class Map:
    """Open the image with the bundle; the key is forgotten either way."""


@dataclasses.dataclass(frozen=True, slots=True)
class Mount:
    """Mount the mapped device."""


@dataclasses.dataclass(frozen=True, slots=True)
class Unmount:
    """Unmount."""


@dataclasses.dataclass(frozen=True, slots=True)
class Unmap:
    """Close the device and all below it."""


@dataclasses.dataclass(frozen=True, slots=True)
class ForgetKey:
    """Wipe the bundle."""


VolumeAction = Attest | Map | Mount | Unmount | Unmap | ForgetKey | Wait


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VolumeSeen:
    """What was observed of one (volume, generation).

    `image_tag` identifies the candidate file, `None` if there is none. `intact` is false once
    dm-verity met a wrong block. `in_use` says that a model server still sees the volume.
    `stuck_until_s` is when a step of closing that failed may be tried again.
    """

    image_tag: tuple[int, ...] | None
    keyed: bool = False
    mapped: bool = False
    mounted: bool = False
    intact: bool = True
    in_use: bool = False
    failure: Failure | None = None
    stuck_until_s: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class VolumePlan:
    """The state to show and the one thing to do."""

    state: VolumeState
    action: VolumeAction


def plan_volume(*, wanted: bool, seen: VolumeSeen, now_s: float) -> VolumePlan:
    """Decide the next action of one volume, which is `wanted` mounted or not at all."""
    if not wanted or not seen.intact:
        return _close(seen, now_s)
    if seen.mounted:
        return VolumePlan(VolumeState.MOUNTED, Wait())
    failure = _standing(seen, now_s)
    if failure is not None and (seen.mapped or seen.keyed):
        return _close(seen, now_s)  # a resting volume holds no key and no device
    if failure is not None:
        return _rest(failure)
    if seen.mapped:
        return VolumePlan(VolumeState.MAPPED, Mount())
    if seen.keyed:
        return VolumePlan(VolumeState.KEYED, Map())
    if seen.image_tag is None:
        return VolumePlan(VolumeState.ABSENT, Wait())
    return VolumePlan(VolumeState.ATTESTING, Attest())


def _standing(seen: VolumeSeen, now_s: float) -> Failure | None:
    """Return the failure that still keeps the volume from being tried."""
    failure = seen.failure
    if failure is None:
        return None
    match failure.error.retry:
        case Retry.NEVER:
            return failure
        case Retry.OPERATOR:  # or a new file
            return failure if failure.image_tag == seen.image_tag else None
        case Retry.BACKOFF | Retry.SLOW:
            return failure if now_s < failure.until_s else None


def _rest(failure: Failure) -> VolumePlan:
    match failure.error.retry:
        case Retry.NEVER | Retry.OPERATOR:
            return VolumePlan(VolumeState.FAILED, Wait())
        case Retry.SLOW:
            return VolumePlan(VolumeState.DENIED, Wait(failure.until_s))
        case Retry.BACKOFF:
            return VolumePlan(VolumeState.BACKOFF, Wait(failure.until_s))


def _close(seen: VolumeSeen, now_s: float) -> VolumePlan:
    state = VolumeState.CLOSING
    if seen.in_use:
        return VolumePlan(state, Wait())
    if seen.stuck_until_s is not None and now_s < seen.stuck_until_s:
        return VolumePlan(state, Wait(seen.stuck_until_s))
    if seen.mounted:
        return VolumePlan(state, Unmount())
    if seen.mapped:
        return VolumePlan(state, Unmap())
    if seen.keyed:
        return VolumePlan(state, ForgetKey())
    return VolumePlan(VolumeState.ABSENT, Wait())


# --- serving ------------------------------------------------------------------


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
class DrainServer:
    """Wait until no stream goes to this slot, or its drain time is over."""

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
    | DrainServer
    | StopServer
    | StopFront
    | Wait
)

SLOTS = ("a", "b")
"""The front's two fixed server slots: one serves, the other is the next or the last one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServingGoal:
    """What should be served: a key for the set of models, and one for the front's settings."""

    models_key: str
    front_key: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerSeen:
    """A living model server. `drained`: no stream goes to it any more."""

    slot: str
    models_key: str
    ready: bool = False
    drained: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServingSeen:
    """What was observed of the children. `front_key` and `active` are `None` without a front."""

    servers: tuple[ServerSeen, ...] = ()
    front_key: str | None = None
    active: str | None = None
    failure: Failure | None = None


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
    drains and stops: so no request fails. A changed front (other certificate or address) is
    restarted.
    """
    if goal is None:
        return _stop_serving(seen)
    server = _matching(goal, seen)
    paused = _paused(seen.failure, now_s)
    if server is None:
        return paused or ServingPlan(ServingState.STARTING, _make_room(seen))
    if not server.ready:
        return ServingPlan(ServingState.STARTING, PollReady(server.slot))
    if seen.front_key is None:
        return paused or ServingPlan(ServingState.STARTING, StartFront(server.slot))
    return _settle(goal, seen, server)


def _make_room(seen: ServingSeen) -> StartServer | StopServer:
    """Start in a slot that the front does not use, after stopping what is left in it."""
    spare = [slot for slot in SLOTS if slot != seen.active]
    taken = {one.slot for one in seen.servers}
    free = [slot for slot in spare if slot not in taken]
    return StartServer(free[0]) if free else StopServer(spare[-1])


def _settle(goal: ServingGoal, seen: ServingSeen, server: ServerSeen) -> ServingPlan:
    """Bring the front to the ready server, then end the other one."""
    if seen.front_key != goal.front_key:
        return ServingPlan(ServingState.DRAINING, StopFront())
    if seen.active != server.slot:
        return ServingPlan(ServingState.DRAINING, SwitchFront(server.slot))
    old = next((one for one in seen.servers if one.slot != server.slot), None)
    if old is None:
        return ServingPlan(ServingState.READY, Wait())
    if old.drained:
        return ServingPlan(ServingState.DRAINING, StopServer(old.slot))
    return ServingPlan(ServingState.DRAINING, DrainServer(old.slot))


def _matching(goal: ServingGoal, seen: ServingSeen) -> ServerSeen | None:
    """Return the server of the goal's models, the one in use first."""
    same = [one for one in seen.servers if one.models_key == goal.models_key]
    return next((one for one in same if one.slot == seen.active), None) or next(
        iter(same), None
    )


def _paused(failure: Failure | None, now_s: float) -> ServingPlan | None:
    if failure is None:
        return None
    if failure.error.retry in (Retry.OPERATOR, Retry.NEVER):
        return ServingPlan(ServingState.FAILED, Wait())
    if now_s < failure.until_s:
        return ServingPlan(ServingState.BACKOFF, Wait(failure.until_s))
    return None


def _stop_serving(seen: ServingSeen) -> ServingPlan:
    if seen.front_key is not None:
        return ServingPlan(ServingState.DRAINING, StopFront())
    if seen.servers:
        return ServingPlan(ServingState.DRAINING, StopServer(seen.servers[0].slot))
    return ServingPlan(ServingState.STOPPED, Wait())
