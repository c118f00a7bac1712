"""What an event loop may do by itself: everything that need not wait for somebody else's server.

Judging is computation and takes about a millisecond, so the loop does it without handing it to a
thread. Only collateral may have to be fetched. What was got lately is at hand; for the rest the
judgement stops with `WouldWaitError` and is made again in a thread, which may wait.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator

from tdxd.owner.collateral.cache import Prepared

__all__ = ["AtHand", "WouldWaitError", "without_waiting"]

_AT_HAND_S = 30.0
_KEPT_MAX = 64
_USED_S = 86400.0
_here = threading.local()


class WouldWaitError(Exception):
    """This needs a thread that may wait; no error that anybody else may handle."""


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    """Let `AtHand.get` of this thread answer from memory only, or raise WouldWaitError."""
    _here.hurry = True
    try:
        yield
    finally:
        _here.hurry = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    value: Prepared
    got_s: float


class AtHand:
    """Stands before a cache that may fetch: keeps an answer for half a minute.

    So what the cache learns meanwhile, such as a higher floor, counts half a minute later.
    """

    def __init__(self, get: Callable[[str, str, float], Prepared]) -> None:
        self._get = get
        self._kept: dict[tuple[str, str], _Kept] = {}

    def get(self, fmspc: str, ca: str, now_s: float) -> Prepared:
        """Return what the cache says, as it would.

        Raises: WouldWaitError inside `without_waiting`, and what the cache raises.
        """
        key = (fmspc, ca)
        kept = self._kept.get(key)
        if (
            kept is not None
            and 0 <= now_s - kept.got_s < _AT_HAND_S
            and now_s < kept.value.expires_s
        ):
            return kept.value
        if getattr(_here, "hurry", False):
            raise WouldWaitError(fmspc)
        value = self._get(fmspc, ca, now_s)
        if len(self._kept) >= _KEPT_MAX:  # anybody may ask for any FMSPC
            self._kept = {}
        self._kept[key] = _Kept(value=value, got_s=now_s)
        return value

    def used(self, now_s: float) -> list[tuple[str, str, Prepared]]:
        """Return FMSPC, CA and set of what was used within a day and may be used."""
        return [
            (fmspc, ca, one.value)
            for (fmspc, ca), one in list(self._kept.items())
            if one.value.ok and now_s - one.got_s < _USED_S
        ]
