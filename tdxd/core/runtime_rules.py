"""What a policy says about the runtime log, and its judgement.

Name and payload of a runtime event are proved by the replay, so rules go by them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

from tdxd.core.check import Check
from tdxd.core.runtime_log import (
    VOLUME_EVENT,
    RuntimeEvent,
    VolumeServed,
    read_volume_event,
)
from tdxd.core.volume_id import check_volume_id
from tdxd.errors import EvidenceMalformedError

__all__ = [
    "ANY_VOLUME",
    "ExpectedVolume",
    "KnownVolumes",
    "RuntimeEventRule",
    "RuntimeRules",
    "judge_expected",
    "judge_runtime",
    "last_served",
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
class ExpectedVolume:
    """A volume that a guest must serve: its id, and its manifest's SHA-256 unless any will do."""

    volume_id: str
    manifest_sha256: bytes | None = None

    @classmethod
    def parse(cls, text: str) -> ExpectedVolume:
        """Read `ID` or `ID:SHA256`, the hash in 64 hex digits.

        Raises: ValueError.
        """
        volume_id, colon, digest = text.partition(":")
        check_volume_id(volume_id)
        if not colon:
            return cls(volume_id=volume_id)
        if not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
            raise ValueError(f"{text[:140]!r}: after the colon are not 64 hex digits")
        return cls(volume_id=volume_id, manifest_sha256=bytes.fromhex(digest))

    def __str__(self) -> str:
        if self.manifest_sha256 is None:
            return self.volume_id
        return f"{self.volume_id}:{self.manifest_sha256.hex()}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeRules:
    """Rules for the runtime log: what a guest may have extended RTMR3 with before.

    `volumes`: ids of volumes that it may serve already, or "*" for every one. Their generation
    and manifest must be in the store either way. Other events must be listed in `allow`.
    `operator_volumes`: ids of volumes that an operator may have opened with a passphrase of his
    own, with whatever in them: no store knows their manifest.
    `expect`: volumes that it must serve, as `ID` or `ID:SHA256`, for clients that judge the guest
    they are about to send data to.
    """

    volumes: tuple[str, ...] = (ANY_VOLUME,)
    allow: tuple[RuntimeEventRule, ...] = ()
    operator_volumes: tuple[str, ...] = ()
    expect: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for item in self.operator_volumes:
            check_volume_id(item)
        for item in self.expect:
            ExpectedVolume.parse(item)
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


def last_served(
    events: Mapping[RuntimeEvent, Sequence[int]],
) -> tuple[VolumeServed, ...]:
    """Return what was served last of each volume, in the order of the log.

    A volume can change its generation while the guest runs: RTMR3 keeps them all, in order.
    Malformed events are left out: `judge_runtime` refuses them.
    """
    found: dict[str, tuple[int, VolumeServed]] = {}
    for event, places in events.items():
        try:
            served = read_volume_event(event)
        except EvidenceMalformedError:
            continue
        if served is not None:
            known = found.get(served.volume_id)
            if known is None or known[0] < places[-1]:
                found[served.volume_id] = (places[-1], served)
    return tuple(served for _, served in sorted(found.values(), key=lambda one: one[0]))


def judge_expected(
    rules: RuntimeRules, events: Mapping[RuntimeEvent, Sequence[int]]
) -> tuple[Check, ...]:
    """Return a check for each volume that must be served: by the last event of its id."""
    served = {one.volume_id: one for one in last_served(events)}
    return tuple(_expected(ExpectedVolume.parse(item), served) for item in rules.expect)


def _expected(wanted: ExpectedVolume, served: Mapping[str, VolumeServed]) -> Check:
    found, digest = served.get(wanted.volume_id), wanted.manifest_sha256
    actual = f"volumes {' '.join(sorted(served)) or 'none'}"
    if found is not None:
        actual = f"{found.volume_id}:{found.manifest_sha256.hex()}"
    return Check(
        name="runtime_volume",
        expected=str(wanted),
        actual=actual,
        ok=found is not None and digest in (None, found.manifest_sha256),
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
        if served.volume_id in rules.operator_volumes:
            return ""
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
