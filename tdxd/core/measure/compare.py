"""Compares an event log with what an image predicts, event by event.

Within each register the two sequences are laid side by side with as few differences as possible, so
that one event too many does not make all later ones look wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from tdxd.core.event_meaning import (
    EV_EFI_ACTION,
    EV_EFI_GPT_EVENT,
    EV_EFI_VARIABLE_BOOT,
    EV_EVENT_TAG,
    EV_IPL,
    EV_SEPARATOR,
    describe,
    meaning_of,
    type_name,
)
from tdxd.core.eventlog import Event
from tdxd.core.log_departure import extending
from tdxd.core.measure.boot import BOOT_APPLICATION, ExpectedEvent, Prediction

__all__ = ["MAX_COMPARED", "Comparison", "Row", "compare"]

MAX_COMPARED = 512
"""Events of one register that are laid side by side; a boot loader with a script has 100."""
Verdict = Literal["same", "taken", "differs", "missing", "extra"]
_DIFFERS = {
    BOOT_APPLICATION: "another program, or another version of it, was started here",
    EV_EFI_GPT_EVENT: "another disk, or its partition table was rewritten",
    EV_EVENT_TAG: "the kernel got another command line or initrd than the UKI holds",
    EV_IPL: "the stub measured other contents",
}
_EXTRA = {
    BOOT_APPLICATION: "a program that is not part of this image was started",
    EV_EFI_ACTION: "firmware took another way: a boot option before this one may have failed",
    EV_EFI_VARIABLE_BOOT: "boot variables are here in this firmware: try --machine alibaba",
    EV_EFI_GPT_EVENT: "firmware looked at another disk, too",
    EV_IPL: "a boot loader or the stub measured something besides",
    EV_EVENT_TAG: "something besides was measured",
}
_PROVED = (EV_EFI_VARIABLE_BOOT, EV_EFI_GPT_EVENT)
"""Taken as they are only if their digest is that of their data."""
_SEPARATOR_HINT = "this firmware extends it elsewhere: try --machine edk2-old"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One place of a register.

    `taken`: no digest was computed, the log's is taken as it is. `index` counts in the whole log.
    """

    register: int
    verdict: Verdict
    expected: ExpectedEvent | None
    found: Event | None
    index: int | None
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether this place is as it must be."""
        return self.verdict in ("same", "taken")

    def facts(self, register_name: str) -> dict[str, object]:
        """Return the row as plain values."""
        expected, found = self.expected, self.found
        digest = expected.digest if expected is not None else None
        return {
            "register": f"{register_name}{self.register}",
            "verdict": self.verdict,
            "index": self.index,
            "type": type_name(_type(expected, found)),
            "expected": None if digest is None else digest.hex(),
            "found": None if found is None else found.digest.hex(),
            "meaning": "" if expected is None else expected.meaning,
            "log_says": "" if found is None else describe(found),
            "note": self.note,
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All places of the registers that can be predicted."""

    rows: tuple[Row, ...]

    @property
    def agrees(self) -> bool:
        """Whether the log is that of a boot of this image."""
        return all(row.ok for row in self.rows)

    @property
    def differences(self) -> tuple[Row, ...]:
        """The places that are not as they must be."""
        return tuple(row for row in self.rows if not row.ok)


def compare(prediction: Prediction, events: Sequence[Event]) -> Comparison:
    """Compare a log that was read, register by register.

    The log proves nothing by itself: that it leads to a quote's registers is another check.
    """
    rows: list[Row] = []
    for register in prediction.machine.predicted:
        wanted = [one for one in prediction.events if one.register == register]
        found = [one for one in extending(events) if one[1].rtmr == register]
        kept, beyond = found[:MAX_COMPARED], found[MAX_COMPARED:]
        rows += _aligned(register, wanted, kept)
        rows += [_extra(register, one) for one in beyond]
    return Comparison(rows=tuple(rows))


_Found = tuple[int, Event]
_MOVE_MISSING, _MOVE_EXTRA, _MOVE_PAIR, _MOVE_STAY = range(4)


def _aligned(
    register: int, wanted: Sequence[ExpectedEvent], found: Sequence[_Found]
) -> list[Row]:
    moves = _moves(wanted, found)
    rows: list[Row] = []
    at, there = len(wanted), len(found)
    while at or there:
        move = moves[at][there]
        if move == _MOVE_EXTRA:
            there -= 1
            rows.append(_extra(register, found[there]))
        elif move == _MOVE_MISSING:
            at -= 1
            if not wanted[at].any_number:
                rows.append(_missing(register, wanted[at]))
        else:
            there -= 1
            at -= move == _MOVE_PAIR
            one = wanted[at] if move == _MOVE_PAIR else wanted[at - 1]
            rows.append(_pair(register, one, found[there]))
    return rows[::-1]


def _moves(wanted: Sequence[ExpectedEvent], found: Sequence[_Found]) -> list[list[int]]:
    """Return for each pair of prefixes the last step of the cheapest way to lay them together."""
    costs = [float(at) for at in range(len(found) + 1)]
    moves = [[_MOVE_EXTRA] * (len(found) + 1)]
    for one in wanted:
        line = [costs[0] + (0 if one.any_number else 1)]
        steps = [_MOVE_MISSING]
        for at, (_, event) in enumerate(found):
            options = [
                (costs[at] + _cost(one, event), _MOVE_PAIR),
                (costs[at + 1] + (0 if one.any_number else 1), _MOVE_MISSING),
                (line[at] + 1, _MOVE_EXTRA),
            ]
            if one.any_number and one.digest is None:
                options.append((line[at] + _cost(one, event), _MOVE_STAY))
            cost, move = min(options)
            line.append(cost)
            steps.append(move)
        costs = line
        moves.append(steps)
    return moves


def _cost(one: ExpectedEvent, event: Event) -> float:
    if one.digest is None:
        proved = one.type not in _PROVED or meaning_of(event) is not None
        return 0 if one.type == event.type and proved else 3
    if one.digest == event.digest:
        return 0 if one.type == event.type else 0.25
    return 1.5 if one.type == event.type else 3


def _pair(register: int, one: ExpectedEvent, found: _Found) -> Row:
    index, event = found
    verdict: Verdict = "differs"
    note = _DIFFERS.get(one.type, "another value was measured")
    if one.digest is None:
        verdict, note = "taken", one.why
    elif one.digest == event.digest:
        verdict, note = "same", ""
    return Row(
        register=register,
        verdict=verdict,
        expected=one,
        found=event,
        index=index,
        note=note,
    )


def _missing(register: int, one: ExpectedEvent) -> Row:
    separator = one.type == EV_SEPARATOR
    note = (
        _SEPARATOR_HINT if separator else "the boot went another way or stopped before"
    )
    return Row(
        register=register,
        verdict="missing",
        expected=one,
        found=None,
        index=None,
        note=note,
    )


def _extra(register: int, found: _Found) -> Row:
    index, event = found
    note = _EXTRA.get(event.type, "nothing of this image measures it")
    return Row(
        register=register,
        verdict="extra",
        expected=None,
        found=event,
        index=index,
        note=note,
    )


def _type(expected: ExpectedEvent | None, found: Event | None) -> int:
    if found is not None:
        return found.type
    assert expected is not None
    return expected.type
