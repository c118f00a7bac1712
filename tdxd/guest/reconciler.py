"""One volume, in one generation: from nothing to mounted, and back.

The loop observes, asks `core.plan.plan_volume`, does the one action it names, and starts over.
Whatever an action raises becomes the volume's failure, which the plan reads next.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

from tdxd.core import plan
from tdxd.core.config import VolumeConfig
from tdxd.core.plan import Failure, VolumePlan, VolumeSeen, VolumeState
from tdxd.core.secret import Secret
from tdxd.errors import (
    IntegrityError,
    RefusedGenerationError,
    Retry,
    TdxdError,
)
from tdxd.guest import opening
from tdxd.guest.failures import error_fields
from tdxd.guest.handover import HandedFailure, HandedVolume
from tdxd.guest.last_error import LastError
from tdxd.guest.lease import VolumeLease
from tdxd.guest.surroundings import Surroundings
from tdxd.guest.volume_device import VolumeDevice
from tdxd.guest.volume_keys import VolumeKeys
from tdxd.host import clock
from tdxd.host.attempts import LONGEST_QUOTE_S

__all__ = ["VolumeReconciler"]

_POLL_S = 2.0
"""How often the world is looked at without being told of a change."""
_CLOSE_RETRY_S = 1.0
_LASTING = (Retry.OPERATOR, Retry.SLOW)
"""Failures that another program of ours would meet, too."""
_OPTIONAL_S = 30.0
"""How long serving waits for an optional volume on its way."""


class VolumeReconciler:
    """Brings one volume to what is wanted of it. `run` returns when it is wanted no more."""

    def __init__(
        self,
        spec: VolumeConfig,
        around: Surroundings,
        *,
        in_use: Callable[[VolumeReconciler], bool],
        held: Callable[[VolumeReconciler], bool] = lambda _one: False,
        newer_than: int | None = None,
    ) -> None:
        self.spec = spec
        self.newer_than = newer_than
        """The open generation that this one is to take over from; only a newer one is opened."""
        self.wanted = True
        self.leaving = False
        """Whether `run` ends once nothing is open."""
        self.state = VolumeState.ABSENT
        self.since = clock.wall_clock()
        self.lease = VolumeLease(spec.id, around)
        self.beat_s = trio.current_time()
        self._release, self._record = around.release, around.record
        self._changes, self._events = around.changes, around.events
        self._standstill, self._nursery = around.standstill, around.nursery
        self._failures = around.failures("volume.failed", spec.id)
        self._in_use, self._held = in_use, held
        self.device = VolumeDevice(spec, around)
        self._keys = VolumeKeys(spec, around, self.device, self.lease)
        self._asked = 1
        """How often something was asked of it; it rests once it has looked after that."""
        self._rested_s = self.beat_s
        self._stuck_until_s: float | None = None
        self._network_news = False
        """Whether a network came up since the last attempt began."""

    # --- what others see and ask ---

    @property
    def failure(self) -> Failure | None:
        """What takes too long now; else the last failure, until it is open or forgotten."""
        return self.device.stalled or self._failures.last

    @property
    def last_error(self) -> LastError | None:
        """The last error there was, also after it has passed."""
        return self._failures.told

    @property
    def generation(self) -> int | None:
        """The generation that is open, or `None` while no key has told it."""
        return self.device.generation

    @property
    def mount_point(self) -> str:
        """Where this generation is, or would be, mounted."""
        return self.device.mount_point

    @property
    def mounted(self) -> bool:
        """Whether the volume is open for use, planned anew as `settled` is.

        The last state shown would lag behind: a reload could take a volume for settled that
        serving does not count yet.
        """
        return self._plan(trio.current_time()).state is VolumeState.MOUNTED

    @property
    def settled(self) -> bool:
        """Whether it rests: reached what is wanted, or waits for time or for somebody.

        Planned anew, so that it is true of what is wanted now, of which it has taken a look.
        What does not go on counts as resting, since nobody can say when it will.
        """
        if self.stalled:
            return True
        step = self._plan(trio.current_time())
        passing = (VolumeState.CLOSING, VolumeState.KEYED)
        waits = isinstance(step.action, plan.Wait) and step.state not in passing
        return waits and self.looked

    @property
    def looked(self) -> bool:
        """Whether it has seen what is there since something was last asked of it."""
        return self.device.looked == self._asked

    @property
    def stalled(self) -> bool:
        """Whether something of it takes longer than it may."""
        return self.device.stalled is not None

    @property
    def absent(self) -> bool:
        """Whether it is known that there is no file to open."""
        step = self._plan(trio.current_time())
        return self.looked and step.state is VolumeState.ABSENT

    @property
    def awaited(self) -> bool:
        """Whether serving waits for it: for one that is not required only for a while."""
        if not self.wanted or self.settled or self.closing:
            return False
        return self.spec.required or trio.current_time() < self._rested_s + _OPTIONAL_S

    @property
    def closing(self) -> bool:
        """Whether it must be closed: it is not wanted, or not intact. Planned anew, too."""
        return self._plan(trio.current_time()).state is VolumeState.CLOSING

    @property
    def forfeited(self) -> bool:
        """Whether it must be closed at once, and cut off from its users. Planned anew, too."""
        return plan.forfeited(self._observe(), trio.current_time())

    def want(self, *, mounted: bool, leave: bool = False) -> None:
        """Set what is wanted; an exchange or a mapping under way is given up if not.

        What leaves stays unwanted, whatever is asked later: another one takes its place.
        """
        self.leaving = self.leaving or leave
        self.wanted = mounted and not self.leaving
        self._asked += 1
        if not self.wanted:
            self.give_up()
        self._changes.ring()

    def offer(self, passphrase: Secret) -> None:
        """Take an operator's passphrase; it is wiped once it was tried, or if it is not used.

        Raises: UsageError for a volume that is not opened so, BusyError while another is tried.
        """
        self.device.offer(passphrase)
        self._changes.ring()

    def give_up(self) -> None:
        """Call an exchange or a mapping under way off."""
        self.device.give_up()
        self.lease.give_up()
        self._keys.give_up()

    def refuse(self, error: TdxdError) -> None:
        """Close this generation, which cannot be served, until another file or a retry.

        An older one goes on, and the key server would release this one again at once.
        """
        text = f"generation {self.generation} of volume {self.spec.id} cannot be served"
        refusal = RefusedGenerationError(f"{text}: {error.message}", hint=error.hint)
        self._failures.add(refusal, image_tag=self.device.image_tag)
        self._changes.ring()

    def retry_now(self) -> None:
        """Forget the last failure and its wait."""
        self._failures.forget()
        self.lease.retry_now()
        self._stuck_until_s = None
        self._asked += 1
        self._changes.ring()

    def network_came_up(self) -> None:
        """Try again at once what a network mends: the last failure, or the attempt under way."""
        self._network_news = True
        self.lease.network_came_up()
        failure = self._failures.last
        if failure is not None and failure.error.retry is Retry.BACKOFF:
            self._failures.forget()
        self._changes.ring()

    # --- the loop ---

    async def run(self) -> None:
        """Observe, plan, act, until `leaving` and nothing is open."""
        while True:
            await self._standstill.passage()
            count = self._changes.count
            self.beat_s = math.inf  # a directory that hangs is not the watchdog's
            await self.device.look(self._asked)
            if self._standstill.frozen:
                continue
            self.beat_s = now_s = trio.current_time()
            step = self._plan(now_s)
            self._show(step.state)
            if not isinstance(step.action, plan.Wait):
                self.beat_s = now_s + self._allowance_s(step.action)
                with self._standstill.running(f"volume {self.spec.id}"):
                    await self._act(step)
                self._show(self._plan(trio.current_time()).state)
                continue
            self._rested_s = now_s
            if self.leaving and step.state is VolumeState.ABSENT:
                return
            limit_s = now_s + _POLL_S
            until_s = step.action.until_s
            await self._changes.after(count, min(limit_s, until_s or limit_s))

    def _plan(self, now_s: float) -> VolumePlan:
        return plan.plan_volume(wanted=self.wanted, seen=self._observe(), now_s=now_s)

    def _allowance_s(self, action: plan.VolumeAction) -> float:
        """Return how long an action may take before the watchdog must doubt this loop.

        What the volume's own thread does holds up nobody else, so it is not the watchdog's.
        """
        match action:
            case plan.Attest():  # an exchange that others began, then its own
                one_s = self._release.timeout_s + LONGEST_QUOTE_S
                return 2 * one_s * len(self._release.servers)
            case (
                plan.Record() | plan.AskOperator()
            ):  # RTMR3 rests while a quote is made
                return LONGEST_QUOTE_S
            case plan.Map() | plan.Mount() | plan.Unmount() | plan.Unmap():
                return math.inf
        return 0.0

    def _observe(self) -> VolumeSeen:
        device = self.device
        if not device.intact and not self._failed_integrity():
            error = opening.lost_error(self.spec)
            self._failures.add(error, image_tag=device.image_tag)
        expired = self.lease.newly_expired()
        if expired is not None:
            self._failures.add(expired, image_tag=device.image_tag)
        return VolumeSeen(
            image_tag=device.image_tag,
            by_operator=self.spec.by_operator,
            keyed=bool(device.bundles),
            mapped=device.mapped is not None,
            mounted=device.mounted,
            recorded=device.mapped is not None
            and self._record.shows(device.mapped.manifest),
            intact=device.intact and not device.doubted,
            in_use=self._in_use(self),
            failure=self._failures.last,
            stuck_until_s=self._stuck_until_s,
            lease=self.lease.seen(trio.current_time()),
            held=self._held(self),
        )

    def _failed_integrity(self) -> bool:
        last = self._failures.last
        return last is not None and isinstance(last.error, IntegrityError)

    def _show(self, state: VolumeState) -> None:
        if state is self.state:
            return
        self.state, self.since = state, clock.wall_clock()
        if state is VolumeState.MOUNTED:
            self._failures.forget()
        self._events.emit(
            f"volume.{state.value}", volume=self.spec.id, generation=self.generation
        )
        self._changes.ring()

    async def _act(self, step: VolumePlan) -> None:
        closing = step.state is VolumeState.CLOSING
        tag = self.device.image_tag
        try:
            await self._do(step.action)
        except TdxdError as exc:
            if closing:
                self._stuck_until_s = trio.current_time() + _CLOSE_RETRY_S
                self._events.emit(
                    "volume.close_failed",
                    level="warning",
                    volume=self.spec.id,
                    **error_fields(exc),
                )
            elif self._called_off(step.action):
                pass  # and wanted again by now, perhaps: it begins anew
            elif self.wanted and not self._standstill.frozen:
                news = self._network_news
                self._failures.add(exc, image_tag=tag, at_once=news)
        else:
            self._stuck_until_s = None
        if self.device.mapped is None and not self.device.bundles:
            self.lease.end()
        self._changes.ring()

    def _called_off(self, action: plan.VolumeAction) -> bool:
        return isinstance(action, plan.Map) and self.device.given_up

    async def _do(self, action: plan.VolumeAction) -> None:
        match action:
            case plan.Attest():
                await self._attest()
            case plan.AskOperator():
                await self._keys.ask_operator()
            case plan.Map():
                await self.device.map()
            case plan.Mount():
                await self.device.mount()
            case plan.Record():
                await self._record.add(self.device.manifest)
            case plan.Renew():
                self.lease.start_renewal(self._nursery, self.device.manifest)
            case plan.Unmount():
                await self.device.unmount()
            case plan.Unmap():
                await self.device.unmap()
            case plan.ForgetKey():
                self.device.forget_keys()

    async def _attest(self) -> None:
        self._network_news = False
        if not await self._keys.attest(newer_than=self.newer_than):
            self.want(mounted=False, leave=True)
        elif self._held(self) and self.device.bundles:
            await self.device.check()  # before the older one makes room for it

    # --- over an exec ---

    def hand_over(self) -> HandedVolume:
        """Return what the program after this one needs; the key is wiped, not handed over."""
        device = self.device
        device.forget_keys()
        failure = self._failures.last
        if failure is not None and failure.error.retry not in _LASTING:
            failure = None
        now_s = trio.current_time()
        return HandedVolume(
            spec=self.spec,
            wanted=self.wanted,
            leaving=self.leaving,
            state=self.state.value,
            since=self.since,
            image=device.image,
            mapped=device.mapped,
            lease=self.lease.hand_over() if device.mapped else None,
            failure=HandedFailure.of(failure, now_s) if failure else None,
            read_before=device.read_before,
            last_error=self.last_error,
            newer_than=self.newer_than,
            opened=device.opened,
        )

    def adopt(self, handed: HandedVolume) -> None:
        """Go on with what the program before this one opened; call it before `run`."""
        self.leaving, self.newer_than = handed.leaving, handed.newer_than
        self.wanted = handed.wanted and not handed.leaving
        self.device.adopt(handed)
        self.lease.adopt(handed.lease)
        self._failures.told = handed.last_error
        if self.device.doubted:
            self._events.emit(
                "volume.not_adopted", level="warning", volume=self.spec.id
            )
        else:
            self.state, self.since = VolumeState(handed.state), handed.since
        if handed.failure is not None:
            self._failures.last = handed.failure.failure(trio.current_time())

    async def close(self) -> None:
        """Close everything, whatever the state, within a time; for the last clean-up."""
        await self.device.close()
