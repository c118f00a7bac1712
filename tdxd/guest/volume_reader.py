"""Reads from mounted volumes: the disk below is the host's, and may not answer for ever.

The daemon's own thread never waits for it: leases run out, and clients of other volumes ask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

from tdxd.errors import StalledError

__all__ = ["VolumeReader"]

T = TypeVar("T")
_READ_S = 10.0
"""A disk that lets a few small files wait longer than this counts as hanging."""


class VolumeReader:
    """Gives each reading a thread of its own; of one volume no other begins while one hangs."""

    def __init__(self, *, patience_s: float = _READ_S) -> None:
        self._patience_s = patience_s
        self._reading: set[str] = set()

    async def read(self, mount_point: str, work: Callable[[], T]) -> T:
        """Do some short reading below a mount point; nobody waits for it longer than it may take.

        Raises: StalledError, at once while an earlier reading still hangs; what `work` raises.
        """
        if mount_point in self._reading:
            raise _stalled(mount_point, "still does not answer")
        self._reading.add(mount_point)

        def run() -> T:
            try:
                return work()
            finally:
                self._reading.discard(mount_point)

        with trio.move_on_after(self._patience_s):
            return await trio.to_thread.run_sync(
                run, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
            )
        text = f"does not answer within {self._patience_s:g} s"
        raise _stalled(mount_point, text)


def _stalled(mount_point: str, what: str) -> StalledError:
    text = f"volume at {mount_point} {what}"
    return StalledError(text, hint="does the disk of the image answer?")
