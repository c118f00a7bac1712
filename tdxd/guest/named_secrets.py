"""Secrets of their own from the key server: asked for, renewed, held in sealed memory, forgotten.

Each is asked for at the start, at a reload, every `key_release.secret_poll_s` and before its lease
runs out. A newer generation takes the place of the one that is there. An older one never does, as
long as the daemon runs; its program may change meanwhile. When a lease runs out unrenewed the
content is forgotten.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import trio

from tdxd.core.config import Config
from tdxd.core.plan import Failure
from tdxd.errors import Retry, TdxdError
from tdxd.guest.attest import Attester
from tdxd.guest.changes import Changes
from tdxd.guest.events import Events
from tdxd.guest.failures import Failures
from tdxd.guest.handover import HandedSecret
from tdxd.guest.held_secret import HeldSecret
from tdxd.guest.leased import LeasedSecret
from tdxd.guest.standstill import Standstill
from tdxd.host import clock

__all__ = ["NamedSecrets", "ShownSecret"]

_LOOK_S = 5.0
"""How often leases and the configuration are looked at without being told of a change."""
_SHOWN_DIGITS = 12


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShownSecret:
    """What status shows of one. `generation` is `None` and `sha256` empty while it is not there.

    `sha256` is the beginning of the content's digest; `lease_left_s` is `None` without a lease.
    """

    id: str
    generation: int | None
    content: str
    sha256: str
    since: str
    lease_left_s: float | None
    failure: Failure | None


class _Asked:
    """One configured secret, and how far asking for it has come."""

    def __init__(self, held: HeldSecret, failures: Failures) -> None:
        self.held, self.failures = held, failures
        self.due_s = -math.inf
        """When it is asked for again, on trio's clock."""
        self.wishes = 1
        """How often it was asked for by somebody; it rests once an answer came after that."""
        self.answered = 0
        self.work: trio.CancelScope | None = None

    @property
    def settled(self) -> bool:
        return self.work is None and self.answered == self.wishes


class NamedSecrets:
    """The secrets that the configuration names, whichever it names at the moment."""

    def __init__(
        self,
        *,
        config: Callable[[], Config],
        attester: Attester,
        changes: Changes,
        events: Events,
        standstill: Standstill,
        nursery: trio.Nursery,
        boottime_s: Callable[[], float] = clock.boottime_s,
    ) -> None:
        self.beat_s = trio.current_time()
        self._config, self._attester = config, attester
        self._changes, self._events = changes, events
        self._standstill, self._nursery = standstill, nursery
        self._boottime_s = boottime_s
        self._asked: dict[str, _Asked] = {}
        self._had: dict[str, HeldSecret] = {}
        """Those that are not configured now: they hold no content, only how new it was."""

    def __repr__(self) -> str:
        return (
            f"NamedSecrets({', '.join(repr(one.held) for one in self._asked.values())})"
        )

    # --- what others see and ask ---

    def pem(self, secret_id: str) -> bytes | None:
        """Return the content of a secret; `None` while it is not there.

        Raises: HostError.
        """
        held = self._usable(secret_id)
        return None if held is None else held.read()

    def tag(self, secret_id: str) -> str | None:
        """Return `ID@GENERATION`, which changes with the content; `None` while it is not there."""
        held = self._usable(secret_id)
        return None if held is None else f"{held.id}@{held.generation}"

    def failure(self, secret_id: str) -> Failure | None:
        """Return why the last attempt to get it failed, also while an older content is there."""
        one = self._asked.get(secret_id)
        return None if one is None else one.failures.last

    def shown(self) -> tuple[ShownSecret, ...]:
        """Return what status shows of each."""
        return tuple(self._shown(name) for name in self._config().secret_ids)

    def ask_now(self) -> None:
        """Ask for all of them at once, whatever failed; `settled` once they have been answered."""
        for one in self._asked.values():
            one.wishes += 1
            one.failures.forget()
            one.due_s = -math.inf
        self._changes.ring()

    def network_came_up(self) -> None:
        """Ask again at once where a network may have been missing."""
        for one in self._asked.values():
            failure = one.failures.last
            if failure is not None and failure.error.retry is Retry.BACKOFF:
                one.due_s = -math.inf
        self._changes.ring()

    @property
    def settled(self) -> bool:
        """Whether nothing is on its way: each was answered, or failed, since it was asked for."""
        wanted = self._config().secret_ids
        return all(name in self._asked and self._asked[name].settled for name in wanted)

    def give_up(self) -> None:
        """Call what is being asked off; it is asked again."""
        for one in self._asked.values():
            if one.work is not None:
                one.work.cancel()

    def close(self) -> None:
        """Forget every content; harmless when repeated."""
        self.give_up()
        for one in self._asked.values():
            one.held.forget()

    # --- the loop ---

    async def run(self) -> None:
        """Ask whenever it is time, until cancelled."""
        self._nursery.start_soon(self._give_up_when_frozen)
        while True:
            await self._standstill.passage()
            count = self._changes.count
            self.beat_s = now_s = trio.current_time()
            self._follow_config()
            for one in self._asked.values():
                self._expire(one)
                if one.work is None and self._due_s(one) <= now_s:
                    one.work = trio.CancelScope()
                    self._nursery.start_soon(self._ask, one, one.work)
            due_s = [self._due_s(one) for one in self._asked.values() if not one.work]
            await self._changes.after(count, min((*due_s, now_s + _LOOK_S)))

    async def _give_up_when_frozen(self) -> None:
        """Let nobody wait for an exchange that gives way to a new program."""
        while True:
            await self._standstill.until_frozen()
            self.give_up()
            await self._standstill.passage()

    def _follow_config(self) -> None:
        """Begin with what the configuration names newly, forget what it names no more."""
        wanted = self._config().secret_ids
        for name in wanted:
            if name not in self._asked:
                held = self._had.pop(name, None) or HeldSecret(name)
                self._asked[name] = _Asked(held, self._failures(name))
        for name in [name for name in self._asked if name not in wanted]:
            gone = self._asked.pop(name)
            if gone.work is not None:
                gone.work.cancel()
            gone.held.forget()
            self._had[name] = gone.held

    def _failures(self, secret_id: str) -> Failures:
        release = self._config().key_release
        return Failures(
            backoff_max_s=release.backoff_max_s,
            slow_s=release.denied_retry_s,
            events=self._events,
            event="secret.failed",
            secret=secret_id,
        )

    def _expire(self, one: _Asked) -> None:
        """Forget a content whose lease is over, and ask for it."""
        held = one.held
        if not held.there or self._left_s(held) != 0.0:
            return
        held.forget()
        if one.failures.last is None:
            one.due_s = -math.inf
        self._events.emit(
            "secret.expired",
            level="warning",
            secret=held.id,
            generation=held.generation,
        )
        self._changes.ring()

    def _due_s(self, one: _Asked) -> float:
        """Return when to ask again: in time for its lease, but not before a failure's pause."""
        failure, lease = one.failures.last, one.held.lease
        if failure is not None or lease is None:
            return one.due_s
        ahead_s = trio.current_time() - self._boottime_s()
        return min(one.due_s, lease.renew_s + ahead_s)

    async def _ask(self, one: _Asked, work: trio.CancelScope) -> None:
        wishes = one.wishes
        with work:
            try:
                leased = await self._attester.secret(one.held.id)
                try:
                    if self._asked.get(one.held.id) is one:  # still wanted
                        self._take(one, leased)
                finally:
                    leased.wipe()
            except TdxdError as exc:
                left_s = self._left_s(one.held)
                one.failures.add(exc, left_s=left_s)
                assert one.failures.last is not None
                one.due_s = one.failures.last.until_s
            one.answered = wishes
            if one.wishes != wishes:  # what came may be older than the wish
                one.due_s = -math.inf
        one.work = None
        self._changes.ring()

    def _take(self, one: _Asked, leased: LeasedSecret) -> None:
        """Hold what came, and set when to ask again.

        Raises: StaleSecretError, HostError.
        """
        held = one.held
        news = held.take(leased)
        one.failures.forget()
        one.due_s = trio.current_time() + self._poll_s()
        fields: dict[str, Any] = {"secret": held.id, "generation": held.generation}
        if news:
            self._events.emit(
                "secret.received",
                **fields,
                content=held.content,
                sha256=held.sha256[:_SHOWN_DIGITS],
                lease_s=leased.lease_s or None,
            )
        elif leased.lease_s:
            self._events.emit("secret.renewed", **fields, lease_s=leased.lease_s)

    def _poll_s(self) -> float:
        """Return the time to the next question: guests of one image must not all ask together."""
        return self._config().key_release.secret_poll_s * (0.9 + 0.2 * clock.jitter())

    # --- what is there ---

    def _left_s(self, held: HeldSecret) -> float | None:
        """Return how long the content may still be used; `None`: for good, or there is none."""
        if held.lease is None:
            return None
        return max(0.0, held.lease.until_s - self._boottime_s())

    def _usable(self, secret_id: str) -> HeldSecret | None:
        one = self._asked.get(secret_id)
        if one is None or not one.held.there or self._left_s(one.held) == 0.0:
            return None
        return one.held

    def _shown(self, secret_id: str) -> ShownSecret:
        held = self._usable(secret_id)
        left_s = None if held is None else self._left_s(held)
        return ShownSecret(
            id=secret_id,
            generation=held.generation if held else None,
            content=held.content if held else "",
            sha256=held.sha256[:_SHOWN_DIGITS] if held else "",
            since=held.since if held else "",
            lease_left_s=None if left_s is None else round(left_s, 1),
            failure=self.failure(secret_id),
        )

    # --- over an exec ---

    def hand_over(self) -> tuple[HandedSecret, ...]:
        """Return what the program after this one needs: contents go by descriptor."""
        known = [*(one.held for one in self._asked.values()), *self._had.values()]
        return tuple(one.hand_over() for one in known if one.generation)

    def adopt(self, handed: tuple[HandedSecret, ...]) -> None:
        """Go on with what the program before this one had; call it before `run`.

        What is there is asked for again within the usual time, but not all guests at once.
        """
        for one in handed:
            held = HeldSecret.adopt(one)
            if one.fd >= 0 and not held.there:
                self._events.emit("secret.not_adopted", level="warning", secret=held.id)
            asked = _Asked(held, self._failures(held.id))
            self._asked[held.id] = asked
            if held.there:
                asked.answered = asked.wishes
                asked.due_s = trio.current_time() + self._poll_s() * clock.jitter()
