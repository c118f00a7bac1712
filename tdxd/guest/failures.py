"""The failures in a row of one thing that is tried again: the last one, and when to go on."""

from __future__ import annotations

import trio

from tdxd.core import plan
from tdxd.core.plan import Failure
from tdxd.errors import Retry, TdxdError
from tdxd.guest.events import Events
from tdxd.guest.last_error import LastError
from tdxd.host import clock

__all__ = ["Failures", "error_fields"]


class Failures:
    """Counts failures, draws the pauses between attempts, and tells each as an event.

    `slow_s` is the shortest pause after a refusal by policy, the longest is three times as long.
    """

    def __init__(
        self,
        *,
        backoff_max_s: float,
        slow_s: float,
        events: Events,
        event: str,
        **fields: str,
    ) -> None:
        self.last: Failure | None = None
        self.told: LastError | None = None
        """What the last one said, also once it is forgotten."""
        self._backoff_max_s, self._slow_s = backoff_max_s, slow_s
        self._events, self._event, self._fields = events, event, fields

    def add(
        self,
        error: TdxdError,
        *,
        image_tag: tuple[int, ...] | None = None,
        at_once: bool = False,
        left_s: float | None = None,
    ) -> None:
        """Count one more; the next attempt may follow `at_once` unless policy refused.

        With `left_s` of a lease to go no pause is longer than half of that. Only what the error
        says is kept: the frames of its traceback hold what they worked with, keys among it.
        """
        error.__traceback__ = error.__cause__ = error.__context__ = None
        attempts = self.last.attempts + 1 if self.last else 1
        self.told = LastError.of(error)
        now_s = trio.current_time()
        pause_s = self._pause_s(error, attempts, at_once=at_once)
        if left_s is not None:
            pause_s = plan.renewal_pause_s(pause_s, left_s=left_s)
        self.last = Failure(
            error=error,
            attempts=attempts,
            since_s=now_s,
            until_s=now_s + pause_s,
            image_tag=image_tag,
        )
        left = {} if left_s is None else {"left_s": round(left_s, 1)}
        self._events.emit(
            self._event,
            level="warning",
            **self._fields,
            **error_fields(error),
            **left,
            attempts=attempts,
        )

    def forget(self) -> None:
        """Begin to count anew."""
        self.last = None

    def _pause_s(self, error: TdxdError, attempts: int, *, at_once: bool) -> float:
        if error.retry is Retry.SLOW:
            return self._slow_s * (1 + 2 * clock.jitter())
        if at_once and error.retry is Retry.BACKOFF:
            return 0.0
        return plan.backoff_s(
            attempts, ceiling_s=self._backoff_max_s, jitter=clock.jitter()
        )


def error_fields(error: TdxdError) -> dict[str, str]:
    """Return an error as the fields of an event."""
    return {"code": error.code, "error": error.message, "hint": error.hint}
