"""The thread of one volume: what a disk or the kernel may keep waiting keeps no other one waiting.

The disk is the host's: a read of it may take for ever, and such a thread cannot be ended. It is
never abandoned while the daemon lives, for it could still leave a mapping behind; but once it has
taken longer than it may, everybody goes on without the volume.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

from tdxd.core.plan import Failure
from tdxd.errors import StalledError
from tdxd.guest.changes import Changes
from tdxd.guest.events import Events
from tdxd.guest.failures import error_fields

__all__ = ["OwnThread"]

T = TypeVar("T")


class OwnThread:
    """Runs one call at a time, in no thread that others could need.

    trio's own limit is one for all threads: forty volumes on a dead disk would use it up.
    """

    def __init__(
        self,
        volume_id: str,
        *,
        changes: Changes,
        events: Events,
        nursery: trio.Nursery,
        only_looks: bool = False,
    ) -> None:
        self.stalled: Failure | None = None
        """What takes longer than it may just now."""
        self._volume_id = volume_id
        self._changes, self._events, self._nursery = changes, events, nursery
        self._only_looks = only_looks
        self._limiter = trio.CapacityLimiter(1)
        self._patience: trio.CancelScope | None = None
        self._abandoned = False

    async def run(self, what: str, work: Callable[[], T], *, allowance_s: float) -> T:
        """Run a call to its end, whoever cancels; `what` names it if it takes too long.

        One that only looks leaves nothing behind, so who cancels it need not wait.
        """
        if self._abandoned:
            await trio.sleep_forever()
        watch = trio.CancelScope()
        self._nursery.start_soon(self._watch, watch, what, allowance_s)
        try:
            with trio.CancelScope(shield=not self._only_looks) as self._patience:
                return await trio.to_thread.run_sync(
                    work, abandon_on_cancel=True, limiter=self._limiter
                )
        finally:
            watch.cancel()
            self._patience = None
            if self.stalled is not None:
                self.stalled = None
                self._changes.ring()
        await trio.sleep_forever()  # abandoned: the daemon is at its end
        raise AssertionError

    def abandon(self) -> None:
        """Wait for the thread no more: the process is about to end, and the thread with it."""
        self._abandoned = True
        if self._patience is not None:
            self._patience.cancel()

    async def _watch(
        self, scope: trio.CancelScope, what: str, allowance_s: float
    ) -> None:
        with scope:
            await trio.sleep(allowance_s)
            text = f"volume {self._volume_id}: {what} takes longer than {allowance_s:.0f} s"
            hint = (
                "does the disk of the image answer? what waits goes on by itself then"
            )
            error, now_s = StalledError(text, hint=hint), trio.current_time()
            self.stalled = Failure(
                error=error, attempts=1, until_s=now_s, since_s=now_s
            )
            self._events.emit(
                "volume.stalled",
                level="warning",
                volume=self._volume_id,
                **error_fields(error),
            )
            self._changes.ring()
