"""A bell: something changed, so look again."""

from __future__ import annotations

import math

import trio

__all__ = ["Changes"]


class Changes:
    """Counts rings, so that none is lost between looking and waiting.

    Take `count` before looking; `after(count)` returns at once if it rang meanwhile.
    """

    def __init__(self) -> None:
        self.count = 0
        self._event = trio.Event()

    def ring(self) -> None:
        """Wake everybody who waits."""
        self.count += 1
        event, self._event = self._event, trio.Event()
        event.set()

    async def after(self, count: int, until_s: float | None = None) -> None:
        """Return once it rang since `count`, or at `until_s` of trio's clock."""
        with trio.move_on_at(math.inf if until_s is None else until_s):
            while self.count == count:
                await self._event.wait()
