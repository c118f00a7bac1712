"""How moments and strangers' text are written for people: in checks, errors and tables."""

from __future__ import annotations

import datetime as dt

__all__ = ["LATEST_S", "shown", "when"]

LATEST_S = 253370764800
"""9999-01-01 in unix seconds: what is later may have no date."""


def when(at_s: int) -> str:
    """Write unix time as ISO 8601, UTC."""
    return dt.datetime.fromtimestamp(at_s, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def shown(text: str, max_chars: int) -> str:
    """Make text of a stranger fit for a terminal: one printable line, and not too long."""
    plain = "".join(
        one if one.isprintable() else " " if one.isspace() else "?"
        for one in text[:max_chars]
    )
    return plain + "…" if len(text) > max_chars else plain
