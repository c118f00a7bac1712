"""Every decision of the reconcilers, as pure functions: what was seen, what to do next.

Level-triggered: a reconciler observes, calls `plan_volume` or `plan_serving`, does the one
action it names, and observes again. States are derived from what was observed, never stored,
so repeating an action or starting over is harmless. Everything that affects a state stands in
this package.

Times are seconds of a monotonic clock.
"""

from __future__ import annotations

from tdxd.core.plan.failure import Failure, Wait, backoff_s, renewal_pause_s
from tdxd.core.plan.room import check_room
from tdxd.core.plan.serving import (
    SLOTS,
    DrainServer,
    PollReady,
    RenewCertificates,
    ServerSeen,
    ServingAction,
    ServingGoal,
    ServingPlan,
    ServingSeen,
    ServingState,
    StartFront,
    StartServer,
    StopFront,
    StopServer,
    SwitchFront,
    plan_serving,
)
from tdxd.core.plan.volume import (
    AskOperator,
    Attest,
    ForgetKey,
    LeaseSeen,
    Map,
    Mount,
    Record,
    Renew,
    Unmap,
    Unmount,
    VolumeAction,
    VolumePlan,
    VolumeSeen,
    VolumeState,
    forfeited,
    plan_volume,
)

__all__ = [
    "SLOTS",
    "AskOperator",
    "Attest",
    "DrainServer",
    "Failure",
    "ForgetKey",
    "LeaseSeen",
    "Map",
    "Mount",
    "PollReady",
    "Record",
    "Renew",
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
    "Unmap",
    "Unmount",
    "VolumeAction",
    "VolumePlan",
    "VolumeSeen",
    "VolumeState",
    "Wait",
    "backoff_s",
    "check_room",
    "forfeited",
    "plan_serving",
    "plan_volume",
    "renewal_pause_s",
]
