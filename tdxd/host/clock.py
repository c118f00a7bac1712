"""Time and chance: seconds of the monotonic clock, wall-clock text, random numbers."""

from __future__ import annotations

import datetime as dt
import random
import time

__all__ = ["boottime_s", "jitter", "wall_clock"]

_random = random.SystemRandom()


def jitter() -> float:
    """Return a number uniform in [0, 1)."""
    return _random.random()


def boottime_s() -> float:
    """Return seconds since the boot, those of a suspension too (CLOCK_BOOTTIME).

    Nobody can set it; every program of one boot sees the same value.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def wall_clock() -> str:
    """Return the time now as ISO 8601 in UTC; for people only: the host owns this clock."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
