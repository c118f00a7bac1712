"""One line of an appraisal: what every check of evidence returns."""

from __future__ import annotations

import dataclasses

__all__ = ["Check", "failed", "passed"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What was expected, what was found, and whether it passed."""

    name: str
    expected: str
    actual: str
    ok: bool


def failed(name: str, expected: str, actual: str) -> Check:
    """Return a check that did not pass."""
    return Check(name=name, expected=expected, actual=actual, ok=False)


def passed(name: str, expected: str, actual: str) -> Check:
    """Return a check that passed."""
    return Check(name=name, expected=expected, actual=actual, ok=True)
