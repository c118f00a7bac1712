"""Where an event log departs from the one of the enrolled guest.

A register that differs says nothing about why. The reference keeps of each event what a person
needs: the first 8 bytes of its digest, its type and a hint. It serves diagnosis alone; what decides
is the register's value in the policy.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence

from tdxd.core.event_meaning import describe
from tdxd.core.eventlog import EV_NO_ACTION, RTMR_COUNT, Event

__all__ = ["Departure", "ReferenceLog", "extending", "first_departure", "reference_log"]

_PREFIX_CHARS = 16
_LINE = re.compile(r"[0-9a-f]{16} \S[ -~]{0,399}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceLog:
    """The events of an enrolled guest; `name` is that of the RTMR set they lead to.

    Each line is 16 hex digits of a digest, the name of the type, and a hint.
    """

    name: str
    rtmr0: tuple[str, ...] = ()
    rtmr1: tuple[str, ...] = ()
    rtmr2: tuple[str, ...] = ()
    rtmr3: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for register, lines in enumerate(self.registers):
            for line in lines:
                if not _LINE.fullmatch(line):
                    text = f"rtmr{register}: {line!r} is not 16 hex digits, a type and a hint"
                    raise ValueError(text)

    @property
    def registers(self) -> tuple[tuple[str, ...], ...]:
        """The lines of RTMR0 to RTMR3."""
        return (self.rtmr0, self.rtmr1, self.rtmr2, self.rtmr3)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """The first event that differs.

    `index` counts in the whole log, or is None where the log has no such event any more;
    `position` counts in the register.
    """

    register: int
    position: int
    index: int | None
    expected: str
    actual: str


def extending(events: Sequence[Event]) -> tuple[tuple[int, Event], ...]:
    """Return the events that extend a register, each with its index in the log."""
    return tuple(
        (index, event)
        for index, event in enumerate(events)
        if event.rtmr >= 0 and event.type != EV_NO_ACTION
    )


def reference_log(name: str, events: Sequence[Event]) -> ReferenceLog:
    """Write the reference of a log that was read and replayed."""
    lines: list[list[str]] = [[] for _ in range(RTMR_COUNT)]
    for _, event in extending(events):
        lines[event.rtmr].append(f"{_prefix(event)} {describe(event)}")
    made = (tuple(one) for one in lines)
    rtmr0, rtmr1, rtmr2, rtmr3 = made
    return ReferenceLog(name=name, rtmr0=rtmr0, rtmr1=rtmr1, rtmr2=rtmr2, rtmr3=rtmr3)


def first_departure(
    reference: ReferenceLog, events: Sequence[Event]
) -> Departure | None:
    """Return where a log departs first, in the order of the log; None if it does nowhere."""
    found: list[list[tuple[int, Event]]] = [[] for _ in range(RTMR_COUNT)]
    for index, event in extending(events):
        found[event.rtmr].append((index, event))
    departures = []
    for register, lines in enumerate(reference.registers):
        departure = _departure(register, lines, found[register])
        if departure is not None:
            departures.append(departure)
    return min(
        departures,
        key=lambda one: len(events) if one.index is None else one.index,
        default=None,
    )


def _departure(
    register: int, lines: Sequence[str], mine: Sequence[tuple[int, Event]]
) -> Departure | None:
    for position, (line, entry) in enumerate(itertools.zip_longest(lines, mine)):
        want = line and line[:_PREFIX_CHARS]
        have = entry and _prefix(entry[1])
        if want == have:
            continue
        expected = "no further event" if line is None else line
        where = f"rtmr{register}, event {position + 1} of {len(lines)}"
        if have is None:
            index, actual = None, f"{where}: missing: the log has {len(mine)}"
        else:
            index, event = entry
            wanted = {one[:_PREFIX_CHARS] for one in lines[position + 1 :]}
            had = {_prefix(one) for _, one in mine[position + 1 :]}
            how = _how(want, have, wanted, had)
            actual = f"{where}: {how}: log entry {index}: {have} {describe(event)}"
        return Departure(
            register=register,
            position=position,
            index=index,
            expected=f"{where}: {expected}",
            actual=actual,
        )
    return None


def _how(want: str | None, have: str, wanted: set[str], had: set[str]) -> str:
    """Say in a word what happened, from what comes later on both sides."""
    removed, added = have in wanted, want is None or want in had
    if removed and added:
        return "in another order"
    if removed:
        return "the expected one is missing"
    return "added" if added else "another"


def _prefix(event: Event) -> str:
    return event.digest.hex()[:_PREFIX_CHARS]
