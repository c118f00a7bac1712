"""One volume: the table of its states."""

from __future__ import annotations

import dataclasses
import enum

from tdxd.core.plan.failure import Failure, Wait
from tdxd.errors import Retry

__all__ = [
    "AskOperator",
    "Attest",
    "ForgetKey",
    "LeaseSeen",
    "Map",
    "Mount",
    "Record",
    "Renew",
    "Unmap",
    "Unmount",
    "VolumeAction",
    "VolumePlan",
    "VolumeSeen",
    "VolumeState",
    "forfeited",
    "plan_volume",
]


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
class AskOperator:
    """Say that an operator must bring the passphrase, and rest until one does."""


@dataclasses.dataclass(frozen=True, slots=True)
class Map:
    """Open the image with the bundle; the key is forgotten either way."""


@dataclasses.dataclass(frozen=True, slots=True)
class Mount:
    """Mount the mapped device."""


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """Extend RTMR3 with the manifest: from now on quotes show this volume. Then it may serve."""


@dataclasses.dataclass(frozen=True, slots=True)
class Renew:
    """Begin to ask for another lease; the volume stays open meanwhile."""


@dataclasses.dataclass(frozen=True, slots=True)
class Unmount:
    """Unmount."""


@dataclasses.dataclass(frozen=True, slots=True)
class Unmap:
    """Close the device and all below it."""


@dataclasses.dataclass(frozen=True, slots=True)
class ForgetKey:
    """Wipe the bundle."""


VolumeAction = (
    Attest
    | AskOperator
    | Map
    | Mount
    | Record
    | Renew
    | Unmount
    | Unmap
    | ForgetKey
    | Wait
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LeaseSeen:
    """Until when the key server lets the volume be open, on the plan's clock.

    `renew_s` is when it is asked for again, `None` while that is under way.
    """

    until_s: float
    renew_s: float | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VolumeSeen:
    """What was observed of one (volume, generation).

    `image_tag` identifies the candidate file, `None` if there is none. `by_operator` says that
    no key server has the key: it is there when somebody brought it. `recorded` says that
    RTMR3 shows the volume, or need not. `intact` is false once dm-verity met a wrong block.
    `in_use` says that a model server still sees the volume. `stuck_until_s` is when a step of
    closing that failed may be tried again. `lease` is `None` if the release was for good.
    `held` says that an older generation of it must be gone before this one may be opened.
    """

    image_tag: tuple[int, ...] | None
    by_operator: bool = False
    keyed: bool = False
    mapped: bool = False
    mounted: bool = False
    recorded: bool = False
    intact: bool = True
    in_use: bool = False
    failure: Failure | None = None
    stuck_until_s: float | None = None
    lease: LeaseSeen | None = None
    held: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class VolumePlan:
    """The state to show and the one thing to do."""

    state: VolumeState
    action: VolumeAction


def forfeited(seen: VolumeSeen, now_s: float) -> bool:
    """Say whether what is open must be closed whoever wants it, and cut off from its users.

    So it is once a block was wrong, or when the lease has run out.
    """
    open_ = seen.keyed or seen.mapped or seen.mounted
    over = seen.lease is not None and now_s >= seen.lease.until_s
    return open_ and (over or not seen.intact)


def plan_volume(*, wanted: bool, seen: VolumeSeen, now_s: float) -> VolumePlan:
    """Decide the next action of one volume, which is `wanted` mounted or not at all."""
    if not wanted or forfeited(seen, now_s):
        return _close(seen, now_s)
    failure = _standing(seen, now_s)
    if failure is not None and (seen.mounted or seen.mapped or seen.keyed):
        return _close(seen, now_s)  # a resting volume holds no key and no device
    if failure is not None:
        return _rest(failure)
    if seen.mounted and seen.recorded:
        return VolumePlan(VolumeState.MOUNTED, _keep(seen.lease, now_s))
    if seen.mounted:
        return VolumePlan(VolumeState.MAPPED, Record())
    if seen.mapped:
        return VolumePlan(VolumeState.MAPPED, Mount())
    if seen.keyed:
        return VolumePlan(VolumeState.KEYED, Wait() if seen.held else Map())
    if seen.image_tag is None:
        return VolumePlan(VolumeState.ABSENT, Wait())
    if seen.by_operator:
        return VolumePlan(VolumeState.FAILED, AskOperator())
    return VolumePlan(VolumeState.ATTESTING, Attest())


def _keep(lease: LeaseSeen | None, now_s: float) -> Renew | Wait:
    """Decide what an open volume needs: nothing, or another lease in time."""
    if lease is None:
        return Wait()
    if lease.renew_s is None:
        return Wait(lease.until_s)
    if now_s >= lease.renew_s:
        return Renew()
    return Wait(min(lease.renew_s, lease.until_s))


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
