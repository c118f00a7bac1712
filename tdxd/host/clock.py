"""Time and chance: seconds of the monotonic clock, wall-clock text, random numbers."""

from __future__ import annotations

import datetime as dt
import random

__all__ = ["jitter", "wall_clock"]

_random = random.SystemRandom()


def jitter() -> float:
    """Return a number uniform in [0, 1)."""
    return _random.random()


def wall_clock() -> str:
    """Return the time now as ISO 8601 in UTC; for people only: the host owns this clock."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
