"""The attester: one quote for all volumes and secrets that wait for a release.

Those that ask within a moment of each other share one exchange; the key server answers
with a verdict for each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Mapping

import trio

from tdxd.errors import TdxdError, WrongKindError
from tdxd.guest.exchanges import Exchanges
from tdxd.guest.leased import AnyLeased, Leased, LeasedSecret
from tdxd.guest.standstill import Standstill

__all__ = ["BATCH_MAX", "Attester", "Bundles", "FetchBundles"]

Bundles = Mapping[str, AnyLeased | TdxdError]
"""A bundle or an error for each id."""
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
        self._waiting: dict[
            str, list[trio.MemorySendChannel[AnyLeased | TdxdError]]
        ] = {}
        self._asked = trio.Event()

    async def bundle(self, volume_id: str) -> Leased:
        """Return the bundle of a volume with its lease, from the next exchange.

        Raises: KeyReleaseError, EvidenceError; WrongKindError if the id is a secret's.
        """
        answer = await self._answer(volume_id)
        if isinstance(answer, LeasedSecret):
            answer.wipe()
            raise WrongKindError(
                f"volume {volume_id}: the key server has a secret of this id, no volume",
                hint="a volume needs the bundle of its image: tdx-keyd add, under another id",
            )
        return answer

    async def secret(self, secret_id: str) -> LeasedSecret:
        """Return a named secret with its lease, from the next exchange.

        Raises: KeyReleaseError, EvidenceError; WrongKindError if the id is a volume's.
        """
        answer = await self._answer(secret_id)
        if isinstance(answer, Leased):
            answer.wipe()
            raise WrongKindError(
                f"secret {secret_id}: the key server has a volume of this id, no secret",
                hint="tdx-keyd secret put makes one, under another id",
            )
        return answer

    async def _answer(self, released_id: str) -> AnyLeased:
        """Return what the next exchange brings for an id: a copy for each who asks.

        Raises: KeyReleaseError, EvidenceError.
        """
        send, receive = trio.open_memory_channel[AnyLeased | TdxdError](1)
        waiting = self._waiting.setdefault(released_id, [])
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
        self, batch: dict[str, list[trio.MemorySendChannel[AnyLeased | TdxdError]]]
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
            for send in asked[1:]:  # each wipes what it got
                send.send_nowait(_copy(answers[volume_id]))
            for send in asked[:1]:
                send.send_nowait(answers[volume_id])


def _copy(answer: AnyLeased | TdxdError) -> AnyLeased | TdxdError:
    return answer if isinstance(answer, TdxdError) else answer.copy()


def _forget(answer: AnyLeased | TdxdError) -> None:
    if not isinstance(answer, TdxdError):
        answer.wipe()
