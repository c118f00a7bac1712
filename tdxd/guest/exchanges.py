"""Counts of the exchanges with key servers: how each ended, and how long they took."""

from __future__ import annotations

import collections
from collections.abc import Iterable

from tdxd.core.exposition import Histogram
from tdxd.errors import TdxdError

__all__ = ["RELEASED", "Exchanges"]

RELEASED = "ok"
_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
"""From a server next door to a queue for quotes."""


class Exchanges:
    """`outcomes` by the code of the error, or `RELEASED` if any volume's key came."""

    def __init__(self) -> None:
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.durations_s = Histogram(_BOUNDS_S)
        """Of quote and answer together; one that was called off does not count."""

    def add(self, answers: Iterable[object], took_s: float) -> None:
        """Count one exchange by its answers, each a bundle or an error."""
        codes = [
            one.code if isinstance(one, TdxdError) else RELEASED for one in answers
        ]
        self.outcomes[RELEASED if RELEASED in codes else codes[0]] += 1
        self.durations_s.observe(took_s)
