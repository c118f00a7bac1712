"""The attester: one quote for all volumes that wait for a key.

Volumes that ask within a moment of each other share one exchange; the key server answers
with a verdict for each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Mapping

import trio

from tdxd.errors import TdxdError
from tdxd.guest.exchanges import Exchanges
from tdxd.guest.leased import Leased
from tdxd.guest.standstill import Standstill

__all__ = ["BATCH_MAX", "Attester", "Bundles", "FetchBundles"]

Bundles = Mapping[str, Leased | TdxdError]
"""A bundle or an error for each volume id."""
FetchBundles = Callable[[tuple[str, ...]], Awaitable[Bundles]]
"""Runs one exchange for these ids, which are sorted."""

BATCH_MAX = 64
"""What one request carries: `core.keyrelease.VOLUMES_MAX`, without its cryptography at start."""
_GATHER_S = 0.05


class Attester:
    """Gathers requests for bundles and runs one exchange at a time."""

    def __init__(self, fetch: FetchBundles, standstill: Standstill) -> None:
        self._fetch = fetch
        self._standstill = standstill
        self.exchanges = Exchanges()
        self._work: trio.CancelScope | None = None
        self._waiting: dict[str, list[trio.MemorySendChannel[Leased | TdxdError]]] = {}
        self._asked = trio.Event()

    async def bundle(self, volume_id: str) -> Leased:
        """Return the bundle of a volume with its lease, from the next exchange.

        Raises: KeyReleaseError, EvidenceError.
        """
        send, receive = trio.open_memory_channel[Leased | TdxdError](1)
        waiting = self._waiting.setdefault(volume_id, [])
        waiting.append(send)
        self._asked.set()
        try:
            answer = await receive.receive()
        finally:
            if send in waiting:
                waiting.remove(send)
            with contextlib.suppress(
                trio.WouldBlock
            ):  # called off when it had just come
                _forget(receive.receive_nowait())
        if isinstance(answer, TdxdError):
            raise answer
        return answer

    async def run(self) -> None:
        """Serve requests until cancelled."""
        while True:
            await self._asked.wait()
            await trio.sleep(_GATHER_S)
            self._asked = trio.Event()
            asking = [(key, asked) for key, asked in self._waiting.items() if asked]
            batch, self._waiting = dict(asking[:BATCH_MAX]), dict(asking[BATCH_MAX:])
            if self._waiting:
                self._asked.set()
            if batch:
                with (
                    self._standstill.running("a key release"),
                    trio.CancelScope() as self._work,
                ):
                    await self._exchange(batch)
                self._work = None

    def give_up(self) -> None:
        """Call an exchange off; those who wait for it must be called off, too."""
        if self._work is not None:
            self._work.cancel()

    async def _exchange(
        self, batch: dict[str, list[trio.MemorySendChannel[Leased | TdxdError]]]
    ) -> None:
        ids, began_s = tuple(sorted(batch)), trio.current_time()
        answers: Bundles
        try:
            answers = await self._fetch(ids)
        except TdxdError as exc:
            answers = dict.fromkeys(ids, exc)
        self.exchanges.add(answers.values(), trio.current_time() - began_s)
        for volume_id, asked in batch.items():
            if not asked:  # nobody waits any more: the key must not stay in memory
                _forget(answers[volume_id])
            for send in asked:
                send.send_nowait(answers[volume_id])


def _forget(answer: Leased | TdxdError) -> None:
    if isinstance(answer, Leased):
        answer.wipe()
