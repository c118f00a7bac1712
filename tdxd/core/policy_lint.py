"""What is legal in a policy, and still worth a second look: the warnings of `policy check`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from tdxd.core.policy import ANY, NEEDED_ATTRIBUTE, Policy, ReleaseRules, TdxRules

__all__ = ["Remark", "lint"]

_GRACE_DAYS = (450, 900)
"""The age counts from the date of the platform's TCB level. Intel's levels of 2024-03-13 and
2025-05-14 were some 610 and 450 days old when the standard collateral called them OutOfDate."""
_ATTRIBUTES = {
    "PERFMON": "performance counters are a side channel",
    "KL": "Key Locker keys outlive what the guest knows of them",
    "PKS": "supervisor protection keys are a feature that the guest may misuse",
    "ICSSD": "its meaning is the TDX module's; no guest of ours needs it",
    "LASS": "no guest of ours needs it",
    "TPA": "no guest of ours needs it",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """One warning: about which key, what it means, and what could stand there instead."""

    path: str
    text: str
    hint: str


def lint(policy: Policy, now_s: float) -> tuple[Remark, ...]:
    """Return the warnings about a valid policy as of `now_s` (unix time)."""
    return (*_tdx(policy.tdx), *_logs(policy), *_release(policy.release, now_s))


def _remark(path: str, text: str, hint: str) -> Remark:
    return Remark(path=path, text=text, hint=hint)


def _tdx(rules: TdxRules) -> Iterator[Remark]:
    if rules.platforms == (ANY,):
        text = (
            "any machine in the world may run this guest, also a stolen or opened one"
        )
        yield _remark("tdx.platforms", text, "list the PPIDs of your hosts")
    if rules.simulated:
        text = (
            "a simulated platform protects nothing; the server decides whose root it is"
        )
        yield _remark("tdx.simulated", text, "leave it out outside of tests")
    for name in rules.td_attributes:
        if name != NEEDED_ATTRIBUTE:
            text = f"{name}: {_ATTRIBUTES.get(name, 'unusual')}"
            yield _remark("tdx.td_attributes", text, f'["{NEEDED_ATTRIBUTE}"] is usual')
    if not rules.mr_seam:
        text = "any TDX module that Intel's TCB info knows passes"
        yield _remark("tdx.mr_seam", text, 'pin it, or write mr_seam = "any"')
    if not rules.xfam:
        text = "any set of known CPU features that do not trace passes"
        yield _remark("tdx.xfam", text, "pin the value of the reference guest")
    yield from _tcb(rules)


def _tcb(rules: TdxRules) -> Iterator[Remark]:
    for status in rules.tcb_status:
        if status == "UpToDate":
            continue
        days = rules.tcb_grace_days.get(status)
        if days is None:
            text = f"{status} passes for ever, whatever becomes known about that level"
            hint = f"tcb_grace_days = {{ {status} = 700 }}"
            yield _remark("tdx.tcb_status", text, hint)
        elif days > _GRACE_DAYS[1]:
            text = f"{days} days is long for a platform with known weaknesses"
            yield _remark(f"tdx.tcb_grace_days.{status}", text, "700 is usual")
        elif days < _GRACE_DAYS[0]:
            text = (
                f"a level is older than {days} days before it falls behind: none passes"
            )
            hint = "it counts from the level's date: 700 gives some months"
            yield _remark(f"tdx.tcb_grace_days.{status}", text, hint)
    if not rules.min_tcb_evaluation:
        text = "a server with an empty store takes collateral of any TCB recovery"
        hint = "write the tcb_evaluation that `tdx-keyd appraise` shows today"
        yield _remark("tdx.min_tcb_evaluation", text, hint)


def _logs(policy: Policy) -> Iterator[Remark]:
    known = [item.name for item in policy.reference]
    for item in policy.tdx.rtmr:
        if item.name not in known:
            text = f"no [[reference]] of set {item.name!r}: a denial names no event"
            hint = "tdx-keyd policy enroll --event-log writes it"
            yield _remark("reference", text, hint)
    for rule in policy.runtime.allow:
        if not rule.payload:
            text = f"event {rule.name} may have any payload"
            yield _remark("runtime.allow", text, "list the payloads you know")


def _release(rules: ReleaseRules, now_s: float) -> Iterator[Remark]:
    if rules.max_per_hour is None:
        text = "nothing limits how many guests get the key"
        yield _remark("release.max_per_hour", text, "write about twice what you need")
    if rules.generations.listed:
        text = "a generation that is added later is released to nobody"
        yield _remark("release.generations", text, '"current" releases the newest one')
    elif rules.generations.newest > 1:
        text = (
            "the host chooses which of them a guest opens, by the file that it offers"
        )
        hint = '"current", once every host has the newest image'
        yield _remark("release.generations", text, hint)
    if rules.lease_s is None:
        text = "a running guest keeps the volume, whatever you revoke later"
        yield _remark("release.lease_s", text, "lease_s = 86400 closes it after a day")
    if rules.not_after is not None and rules.not_after < now_s:
        text = "this moment has passed: nothing is released any more"
        yield _remark("release.not_after", text, "write a later one, or leave it out")
