"""Failures and waiting: the last error, when to try again, and for how long to do nothing."""

from __future__ import annotations

import dataclasses

from tdxd.errors import TdxdError

__all__ = ["Failure", "Wait", "backoff_s", "renewal_pause_s"]

_LAST_CHANCE_S = 1.0
"""Renewals that fail come closer to each other as a lease runs out, but not closer than this."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The last error, how often in a row, and when the next attempt may start.

    `image_tag` names the file that it concerns: another file makes the failure void.
    """

    error: TdxdError
    attempts: int
    until_s: float
    since_s: float
    image_tag: tuple[int, ...] | None = None


def backoff_s(attempts: int, *, ceiling_s: float, jitter: float) -> float:
    """Return the wait before the next attempt: full-jitter exponential backoff.

    `attempts` counts failures in a row, from 1; `jitter` is uniform in [0, 1). The wait is
    uniform in [0.2 s, min(ceiling, 1 s x 2^attempts)).
    """
    top = min(ceiling_s, 2.0 ** min(attempts, 16))
    return 0.2 + jitter * max(0.0, top - 0.2)


def renewal_pause_s(pause_s: float, *, left_s: float) -> float:
    """Return the wait before a lease with `left_s` to go is asked for again.

    At most half of what is left, so that no pause, however long, outlasts the lease: until its
    last second there is another try.
    """
    return max(_LAST_CHANCE_S, min(pause_s, left_s / 2))


@dataclasses.dataclass(frozen=True, slots=True)
class Wait:
    """Do nothing until something changes, or until a time (`None`: for ever)."""

    until_s: float | None = None
