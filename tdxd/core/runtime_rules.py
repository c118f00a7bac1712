"""What a policy says about the runtime log, and its judgement.

Name and payload of a runtime event are proved by the replay, so rules go by them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

from tdxd.core.check import Check
from tdxd.core.runtime_log import VOLUME_EVENT, RuntimeEvent, read_volume_event
from tdxd.errors import EvidenceMalformedError

__all__ = [
    "ANY_VOLUME",
    "KnownVolumes",
    "RuntimeEventRule",
    "RuntimeRules",
    "judge_runtime",
]

ANY_VOLUME = "*"
"""Stands for every volume of the store; no volume can have this id."""
KnownVolumes = Callable[[str, int, bytes], bool]
"""Whether the store holds this volume id, generation and SHA-256 of the manifest."""
_HEX = re.compile(r"([0-9a-f]{2})*")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeEventRule:
    """A runtime event that may stand in the log: its name and payloads in hex; none is any.

    `required`: it must stand there exactly once.
    """

    name: str
    payload: tuple[str, ...] = ()
    required: bool = False

    def __post_init__(self) -> None:
        RuntimeEvent(name=self.name, payload=b"")
        if self.name == VOLUME_EVENT:
            raise ValueError(f"{VOLUME_EVENT} events are ruled by volumes")
        for value in self.payload:
            if not _HEX.fullmatch(value):
                raise ValueError(f"payload {value!r} is not lower-case hex")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeRules:
    """Rules for the runtime log: what a guest may have extended RTMR3 with before.

    `volumes`: ids of volumes that it may serve already, or "*" for every one. Their generation
    and manifest must be in the store either way. Other events must be listed in `allow`.
    """

    volumes: tuple[str, ...] = (ANY_VOLUME,)
    allow: tuple[RuntimeEventRule, ...] = ()

    def __post_init__(self) -> None:
        names = [item.name for item in self.allow]
        if len(names) != len(set(names)):
            raise ValueError("allow: a name is listed twice")


def judge_runtime(
    rules: RuntimeRules,
    events: Mapping[RuntimeEvent, Sequence[int]],
    known: KnownVolumes,
) -> Check:
    """Return one check for all events of a runtime log: each with its places, by the first.

    It names the first that may not be there, and looks no further: `known` may ask a database.
    """
    problems = (
        f"runtime event {places[0]}: {problem}"
        for event, places in events.items()
        if (problem := _runtime_problem(rules, event, known))
    )
    counts = (
        (rule.name, _count(events, rule.name)) for rule in rules.allow if rule.required
    )
    missing = (f"{count} events {name}, not 1" for name, count in counts if count != 1)
    problem = next(problems, "") or next(missing, "")
    volumes = f"known volumes {' '.join(rules.volumes) or 'none'}"
    return Check(
        name="runtime_events",
        expected="; ".join((volumes, *(rule.name for rule in rules.allow))),
        actual=problem or f"{sum(map(len, events.values()))} events",
        ok=not problem,
    )


def _count(events: Mapping[RuntimeEvent, Sequence[int]], name: str) -> int:
    return sum(len(places) for event, places in events.items() if event.name == name)


def _runtime_problem(
    rules: RuntimeRules, event: RuntimeEvent, known: KnownVolumes
) -> str:
    """Say why an event may not stand in the log; empty if it may."""
    try:
        served = read_volume_event(event)
    except EvidenceMalformedError as exc:
        return exc.message
    if served is not None:
        what = f"volume {served.volume_id} generation {served.generation}"
        if ANY_VOLUME not in rules.volumes and served.volume_id not in rules.volumes:
            return f"{what} is not allowed"
        if not known(served.volume_id, served.generation, served.manifest_sha256):
            return f"{what} has a manifest that is not in the store"
        return ""
    rule = next((one for one in rules.allow if one.name == event.name), None)
    if rule is None:
        return f"{event.name} is not allowed"
    if rule.payload and event.payload.hex() not in rule.payload:
        return f"{event.name} has another payload, of {len(event.payload)} bytes"
    return ""
