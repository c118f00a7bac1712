"""What a policy says about the events of firmware's log, beside the values of its registers.

The rules go by digests, computed here from the policy's own words by the rule of the event's type
(core/event_meaning.py): whoever writes the log chooses types and data, but no digest. So a
forbidden thing is found whatever its event claims to be, and a required one must stand where
nobody but firmware can measure chosen bytes: a variable before the register's first separator. A
required text or digest proves that these bytes were measured, not by whom: that rests on the
pinned value of the register, or on an `only` list.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from tdxd.core.check import Check
from tdxd.core.event_meaning import (
    EV_EFI_ACTION,
    EV_EFI_VARIABLE_DRIVER_CONFIG,
    EV_EVENT_TAG,
    EV_IPL,
    SECURE_BOOT_VARIABLES,
    SEPARATOR_DIGESTS,
    describe,
    meaning_of,
    text_digests,
    variable_digest,
)
from tdxd.core.eventlog import RTMR_COUNT, Event
from tdxd.core.log_departure import extending
from tdxd.core.quote import MEASUREMENT_BYTES

__all__ = ["EventLogRules", "EventMatch", "OnlyEvents", "judge_events"]

_DIGEST = re.compile(rf"[0-9a-f]{{{2 * MEASUREMENT_BYTES}}}")
_HEX = re.compile(r"([0-9a-f]{2})*")
_TEXT_TYPES = (EV_IPL, EV_EFI_ACTION)
"""Types whose data holds the text that was measured."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EventMatch:
    """One event: a Secure Boot variable with its value in hex, a text, or a digest in hex.

    A text is what a boot loader or the firmware measured as a string, such as a kernel command
    line: exactly, in UTF-8 or UTF-16, with or without its final NUL.
    """

    register: int
    variable: str = ""
    value: str | None = None
    text: str = ""
    digest: str = ""

    def __post_init__(self) -> None:
        _register(self.register)
        if sum(map(bool, (self.variable, self.text, self.digest))) != 1:
            raise ValueError("exactly one of variable, text and digest must be given")
        if (self.value is not None) != bool(self.variable):
            raise ValueError("a variable needs a value, and nothing else has one")
        if self.variable and self.variable not in SECURE_BOOT_VARIABLES:
            known = ", ".join(SECURE_BOOT_VARIABLES)
            raise ValueError(f"variable {self.variable!r} is not one of {known}")
        if not _HEX.fullmatch(self.value or ""):
            raise ValueError(f"value {self.value!r} is not lower-case hex")
        if self.digest:
            _digest(self.digest)

    def __str__(self) -> str:
        if self.variable:
            what = f"variable {self.variable} = {self.value or 'empty'}"
        else:
            what = f"text {self.text!r}" if self.text else f"digest {self.digest}"
        return f"rtmr{self.register}: {what}"

    def digests(self) -> tuple[bytes, ...]:
        """Return every digest that the event may have."""
        if self.variable:
            value = bytes.fromhex(self.value or "")
            return (variable_digest(self.variable, value),)
        return text_digests(self.text) if self.text else (bytes.fromhex(self.digest),)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OnlyEvents:
    """All events of one register, in order: for each, the digests in hex that it may have.

    Several values per place spare the cross product of sets that pinned values would need.
    """

    register: int
    events: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        _register(self.register)
        for position, allowed in enumerate(self.events):
            if not allowed:
                raise ValueError(f"events[{position}] is empty, so nothing could pass")
            for value in allowed:
                _digest(value)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EventLogRules:
    """Rules for firmware's log. `required`: a guest that sends none is refused.

    Any entry of the lists refuses such a guest too, for nothing can be judged then.
    """

    required: bool = False
    require: tuple[EventMatch, ...] = ()
    forbid: tuple[EventMatch, ...] = ()
    only: tuple[OnlyEvents, ...] = ()

    def __post_init__(self) -> None:
        registers = [item.register for item in self.only]
        if len(registers) != len(set(registers)):
            raise ValueError("only: a register is listed twice")


def judge_events(rules: EventLogRules, events: Sequence[Event]) -> list[Check]:
    """Return a check for each entry of the rules."""
    if not (rules.require or rules.forbid or rules.only):
        return []
    found = extending(events)
    return [
        *(
            _require(f"event_log.require[{index}]", match, found)
            for index, match in enumerate(rules.require)
        ),
        *(
            _forbid(f"event_log.forbid[{index}]", match, found)
            for index, match in enumerate(rules.forbid)
        ),
        *(
            _only(f"event_log.only[{index}]", item, found)
            for index, item in enumerate(rules.only)
        ),
    ]


def _require(name: str, match: EventMatch, found: Sequence[tuple[int, Event]]) -> Check:
    digests = match.digests()
    mine = [(index, event) for index, event in found if event.rtmr == match.register]
    hits = [
        index
        for index, event in mine
        if event.digest in digests and _reads_so(match, event)
    ]
    if match.variable:
        problem = _variable_problem(match.variable, hits, mine)
    else:
        problem = "" if hits else f"no such event in rtmr{match.register}"
    actual = problem or f"log entry {hits[0]}"
    return Check(name=name, expected=str(match), actual=actual, ok=not problem)


def _reads_so(match: EventMatch, event: Event) -> bool:
    """Say whether type and data of an event with the right digest tell the same.

    Linux' EFI stub measures its load options in an EV_EVENT_TAG that does not hold them.
    """
    if match.digest:
        return True
    if match.text and event.type == EV_EVENT_TAG:
        return True
    types = _TEXT_TYPES if match.text else (EV_EFI_VARIABLE_DRIVER_CONFIG,)
    return event.type in types and meaning_of(event) is not None


def _variable_problem(
    variable: str, hits: Sequence[int], mine: Sequence[tuple[int, Event]]
) -> str:
    """Say why a variable does not count; empty if it does.

    It must be said once, and before the first separator: later, tables and boot options that the
    host chooses are measured byte for byte, and one of them could be shaped like a variable.
    """
    end = next((n for n, event in mine if event.digest in SEPARATOR_DIGESTS), None)
    if end is None:
        return "no separator ends the variables"
    early = [(index, event) for index, event in mine if index < end]
    said = [
        index
        for index, event in early
        if (meaning := meaning_of(event)) is not None
        and (meaning.kind, meaning.name) == ("variable", variable)
    ]
    if len(said) > 1:
        return f"log entries {' and '.join(map(str, said[:2]))} both say {variable}"
    if not any(index < end for index in hits):
        return f"no such event before the separator, log entry {end}"
    return ""


def _forbid(name: str, match: EventMatch, found: Sequence[tuple[int, Event]]) -> Check:
    digests = match.digests()
    hits = [
        index
        for index, event in found
        if event.rtmr == match.register and event.digest in digests
    ]
    problem = "no event log to look through" if not found else ""
    if hits:
        problem = f"log entry {hits[0]}"
    return Check(
        name=name,
        expected=f"not {match}",
        actual=problem or "not there",
        ok=not problem,
    )


def _only(name: str, item: OnlyEvents, found: Sequence[tuple[int, Event]]) -> Check:
    mine = [(index, event) for index, event in found if event.rtmr == item.register]
    expected = f"rtmr{item.register}: {len(item.events)} listed events"
    for (index, event), allowed in zip(mine, item.events, strict=False):
        if event.digest.hex() not in allowed:
            actual = f"log entry {index}: {event.digest.hex()} {describe(event)}"
            return Check(name=name, expected=expected, actual=actual, ok=False)
    same = len(mine) == len(item.events) and bool(found)
    return Check(name=name, expected=expected, actual=f"{len(mine)} events", ok=same)


def _register(register: int) -> None:
    if not 0 <= register < RTMR_COUNT:
        raise ValueError(f"register {register} is not 0 to {RTMR_COUNT - 1}")


def _digest(value: str) -> None:
    if not _DIGEST.fullmatch(value):
        raise ValueError(
            f"{value!r} is not {MEASUREMENT_BYTES} bytes in lower-case hex"
        )
