"""The appraisal of a guest's two logs against its quote and the policy.

Firmware's log must replay to RTMR0 to RTMR2 and, with the runtime log on top, to RTMR3. The values
that the policy pins decide what may run; the rules of core/event_match.py and
core/runtime_rules.py say in addition what must or must not have been measured.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Protocol, TypeVar

from tdxd.core.check import Check
from tdxd.core.event_match import EventLogRules, EventMatch, OnlyEvents, judge_events
from tdxd.core.event_meaning import describe
from tdxd.core.eventlog import (
    EV_NO_ACTION,
    Event,
    parse_event_log,
    replay,
)
from tdxd.core.log_departure import ReferenceLog, first_departure, reference_log
from tdxd.core.quote import TdReport
from tdxd.core.runtime_log import RuntimeEvent, parse_runtime_log, replay_runtime
from tdxd.core.runtime_rules import (
    ANY_VOLUME,
    KnownVolumes,
    RuntimeEventRule,
    RuntimeRules,
    judge_expected,
    judge_runtime,
)
from tdxd.errors import EvidenceMalformedError

__all__ = [
    "ANY_VOLUME",
    "EventLogRules",
    "EventMatch",
    "LogAppraisal",
    "OnlyEvents",
    "ReferenceLog",
    "RuntimeEventRule",
    "RuntimeRules",
    "appraise_logs",
    "nearest_set",
    "reference_log",
]


class RegisterSet(Protocol):
    """The pinned registers of one image: RTMR0 to RTMR3 in hex."""

    @property
    def name(self) -> str:
        """What a `ReferenceLog` of this image is called too."""

    @property
    def values(self) -> tuple[str, str, str, str]:
        """RTMR0 to RTMR3."""


_Set = TypeVar("_Set", bound=RegisterSet)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LogAppraisal:
    """The result for both logs.

    `initial_rtmr3` (48 bytes) is RTMR3 before any runtime event: the value that a policy pins, so
    that a guest which serves already can ask again.
    """

    checks: tuple[Check, ...]
    initial_rtmr3: bytes


def appraise_logs(
    rules: EventLogRules,
    runtime: RuntimeRules,
    references: Sequence[ReferenceLog],
    report: TdReport,
    event_log: bytes,
    runtime_log: bytes,
    known_volumes: KnownVolumes,
    *,
    sets: Sequence[RegisterSet],
) -> LogAppraisal:
    """Judge the logs of a guest against its quote and the policy; never raises.

    `sets` are the policy's pinned registers: where none of them fits, or the log does not replay,
    a check `event_log` names the first event that departs from the nearest set's reference.
    """
    events, registers, problem = _read_log(event_log)
    if problem:
        return _malformed("event_log", problem, report)
    initial = registers[3]
    if not event_log and not runtime_log:
        initial = report.rtmrs[3]
    later = _read_runtime_log(runtime_log, initial)
    if later.problem:
        return _malformed("runtime_log", later.problem, report)
    if event_log:
        replayed = _replayed(registers, events, report)
    else:
        replayed = _check(
            "event_log_replay", "rtmr0 to rtmr2 of the quote", "no event log", ok=True
        )
    checks = [
        _present(event_log, events, required=rules.required),
        replayed,
        *judge_events(rules, events),
        _runtime_replay(later, report.rtmrs[3]),
        judge_runtime(runtime, later.places, known_volumes),
        *judge_expected(runtime, later.places),
    ]
    if event_log:
        actual = (*report.rtmrs[:3], initial)
        checks += _departure(references, sets, actual, events, doubt=not replayed.ok)
    return LogAppraisal(checks=tuple(checks), initial_rtmr3=initial)


def nearest_set(sets: Sequence[_Set], registers: Sequence[bytes]) -> _Set:
    """Return the set that agrees in most of RTMR0 to RTMR3; of several, the first."""
    found = [value.hex() for value in registers]

    def agreement(item: _Set) -> int:
        pairs = zip(item.values, found, strict=True)
        return sum(want.lower() == have for want, have in pairs)

    return max(sets, key=agreement)


@functools.lru_cache(maxsize=4)
def _read_log(log: bytes) -> tuple[tuple[Event, ...], tuple[bytes, ...], str]:
    """Return the events, RTMR0 to RTMR3 after them, and what is malformed, if anything.

    Kept, since guests of one image all send the same log, and each volume of a request is judged
    by it.
    """
    try:
        events = parse_event_log(log)
    except EvidenceMalformedError as exc:
        return (), (), exc.message
    return events, replay(events), ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _RuntimeLog:
    """The places of each event, in the order of the first; RTMR3 after all of them."""

    count: int = 0
    places: dict[RuntimeEvent, list[int]] = dataclasses.field(default_factory=dict)
    rtmr3: bytes = b""
    problem: str = ""


@functools.lru_cache(maxsize=4)
def _read_runtime_log(log: bytes, initial: bytes) -> _RuntimeLog:
    """Read and replay a runtime log from a value of RTMR3; kept as firmware's is.

    An event may stand there thousands of times: it is judged once.
    """
    try:
        events = parse_runtime_log(log)
    except EvidenceMalformedError as exc:
        return _RuntimeLog(problem=exc.message)
    places: dict[RuntimeEvent, list[int]] = {}
    for index, event in enumerate(events):
        places.setdefault(event, []).append(index)
    rtmr3 = replay_runtime(initial, events)
    return _RuntimeLog(count=len(events), places=places, rtmr3=rtmr3)


def _malformed(name: str, problem: str, report: TdReport) -> LogAppraisal:
    check = _check(name, "well-formed", problem, ok=False)
    return LogAppraisal(checks=(check,), initial_rtmr3=report.rtmrs[3])


# --- the registers -------------------------------------------------------------


def _present(log: bytes, events: Sequence[Event], *, required: bool) -> Check:
    return _check(
        "event_log_present",
        "yes" if required else "yes, or registers pinned by value alone",
        f"{len(events)} events" if log else "no event log",
        ok=bool(log) or not required,
    )


def _replayed(
    registers: Sequence[bytes], events: Sequence[Event], report: TdReport
) -> Check:
    wrong = [
        f"rtmr{index} replays to {registers[index].hex()}"
        for index in range(3)
        if registers[index] != report.rtmrs[index]
    ]
    odd = (  # MRTD was fixed at launch: nothing can have extended it
        f"log entry {index} claims to extend MRTD: {describe(event)}"
        for index, event in enumerate(events)
        if event.rtmr < 0 and event.type != EV_NO_ACTION
    )
    wrong += itertools.islice(odd, 3)
    actual = ", ".join(wrong[:3]) or "the same"
    return _check(
        "event_log_replay", "rtmr0 to rtmr2 of the quote", actual, ok=not wrong
    )


def _runtime_replay(later: _RuntimeLog, rtmr3: bytes) -> Check:
    expected = f"rtmr3 of the quote: {rtmr3.hex()}"
    text = f"{later.rtmr3.hex()} by {later.count} runtime events"
    return _check("runtime_log", expected, text, ok=later.rtmr3 == rtmr3)


def _departure(
    references: Sequence[ReferenceLog],
    sets: Sequence[RegisterSet],
    actual: Sequence[bytes],
    events: Sequence[Event],
    *,
    doubt: bool,
) -> list[Check]:
    """Compare the log with the reference of the nearest set, if anything differs."""
    if not sets:
        return []
    nearest = nearest_set(sets, actual)
    whole = tuple(bytes.fromhex(value) for value in nearest.values) == tuple(actual)
    if whole and not doubt:
        return []
    for reference in references:
        if reference.name == nearest.name:
            departure = first_departure(reference, events)
            if departure is not None:
                expected = f"{departure.expected} ({reference.name})"
                return [_check("event_log", expected, departure.actual, ok=False)]
    return []


def _check(name: str, expected: str, actual: str, *, ok: bool) -> Check:
    return Check(name=name, expected=expected, actual=actual, ok=ok)
